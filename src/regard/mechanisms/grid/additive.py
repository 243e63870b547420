"""Additive attention from convolutions and gates (CAS-ViT)."""

from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ShapeError
from regard.layers import load_strictly
from regard.layers.grid import BatchNorm2d, DepthwiseConv2d
from regard.mechanisms.base import check_rate
from regard.mechanisms.grid.base import GridMechanism


class Gates(NamedTuple):
    """Where (B, H, W, 1) and in which channels (B, 1, 1, C) a map was kept, both from 0 to 1."""

    spatial: Tensor
    channel: Tensor


class SpatialChannelGate(nn.Module):
    """``z' = z ∘ σ(ReLU(BN(conv(z))) w)``, one number per pixel, then ``z' ∘ σ(mean(z') W)``, one per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = DepthwiseConv2d(dim)
        self.bn = BatchNorm2d(dim)
        self.spatial = nn.Linear(dim, 1, bias=False)
        self.channel = nn.Linear(dim, dim, bias=False)

    def gates(self, z: Tensor) -> Gates:
        spatial = self.spatial(F.relu(self.bn(self.conv(z)))).sigmoid()
        return Gates(spatial, self.channel((z * spatial).mean((1, 2), keepdim=True)).sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        spatial, channel = self.gates(z)
        return z * spatial * channel


class AdditiveTokenMixer(GridMechanism):
    """Queries and keys are gated each by themselves and added, not multiplied (CAS-ViT, arXiv:2408.03703).

        q, k, v = x Wqkv        y = conv_o(conv(Φ_q(q) + Φ_k(k)) ∘ v)

    x (B, H, W, C) to the same, at any size; linear, without softmax or scale. Φ is `SpatialChannelGate`, convolutions
    are depthwise 3×3. A token sees its neighbours and, through the channel gates, the mean of the image, so there is
    no causal form.

    Args:
        dim: C.
        qkv_bias: of Wqkv.
        proj_drop: dropout of the output.
    """

    cost: ClassVar[str] = "O(N C²), N = H W"

    def __init__(self, dim: int, qkv_bias: bool = False, proj_drop: float = 0.0):
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_gate, self.k_gate = SpatialChannelGate(dim), SpatialChannelGate(dim)
        self.mix, self.proj = DepthwiseConv2d(dim), DepthwiseConv2d(dim)
        self.proj_drop = nn.Dropout(check_rate("proj_drop", proj_drop))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        return self.proj_drop(self.proj(self.mix(self.q_gate(q) + self.k_gate(k)) * v))

    def gates(self, x: Tensor) -> tuple[Gates, Gates]:
        """Those of the queries and those of the keys: what stands for attention maps here."""
        q, k, _ = self._qkv(x)
        return self.q_gate.gates(q), self.k_gate.gates(k)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        return self.qkv(x).chunk(3, -1)

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, dim: int = 512, attn_bias: bool = False, proj_drop: float = 0.0
    ) -> "AdditiveTokenMixer":
        """The published ``AdditiveTokenMixer``."""
        module = cls(dim, attn_bias, proj_drop)
        load_strictly(module, state_dict, published_names())
        return module


def published_names(prefix: str = "", own: str = "") -> dict[str, str]:
    """Prefixes of the published mixer's weights, and ours."""
    names = {"": "", "dwc": "mix"}
    for which in "qk":
        spatial, channel, gate = f"oper_{which}.0.block", f"oper_{which}.1.block", f"{which}_gate"
        names |= {f"{spatial}.0": f"{gate}.conv", f"{spatial}.1": f"{gate}.bn", f"{spatial}.3": f"{gate}.spatial"}
        names |= {f"{channel}.1": f"{gate}.channel"}
    return {prefix + old: own + new for old, new in names.items() if prefix + old}
