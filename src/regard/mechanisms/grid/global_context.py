"""Global context attention (GC ViT): all windows of an image are asked the same queries, made from the whole image."""

from collections.abc import Sequence
from typing import ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, per_head, split_heads
from regard.layers.grid import DepthwiseConv2d
from regard.layers.squeeze_excite import SqueezeExcite
from regard.mechanisms.grid.partition import BlockAttention, PartitionAttention


class FusedConv(nn.Module):
    """``x + W SE(GELU(dwconv(x)))``, without biases; (B, H, W, C) to the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, bias=False)
        self.se = SqueezeExcite(dim, dim // 4, nn.GELU, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.se(F.gelu(self.dwconv(x))))


#: published names of `FusedConv`
FUSED_CONV = {"conv.0": "dwconv", "conv.2.fc.0": "se.fc1", "conv.2.fc.2": "se.fc2", "conv.3": "proj"}


class GlobalQueryGenerator(nn.Module, PyTorchModelHubMixin):
    """One set of queries for all windows of an image: x (B, H, W, C) to (B, heads, w², D) (arXiv:2206.09959).

    Convolutions, each followed by max pooling, halve the image until it has the size of a window.

    Args:
        dim: C.
        num_heads: heads.
        window_size: w; the image must have this size after the poolings.
        num_downsamples: poolings; with 0 there is one convolution and no pooling.

    Raises:
        ShapeError: the image does not end up as large as a window.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, num_downsamples: int):
        super().__init__()
        if num_downsamples < 0:
            raise ArgumentError(f"num_downsamples: expected at least 0, got {num_downsamples}")
        per_head(dim, num_heads)
        self.dim, self.num_heads, self.window_size, self.num_downsamples = dim, num_heads, window_size, num_downsamples
        self.convs = nn.ModuleList(FusedConv(dim) for _ in range(max(1, num_downsamples)))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        self.check_size(*x.shape[1:3])
        for conv in self.convs:
            x = conv(x)
            if self.num_downsamples:
                x = F.max_pool2d(x.movedim(-1, 1), 3, 2, 1).movedim(1, -1)
        return split_heads(x.flatten(1, 2), self.num_heads)

    def check_size(self, height: int, width: int) -> None:
        """Refuse images that do not end up as large as a window."""
        sides = tuple(-(-side // 2**self.num_downsamples) for side in (height, width))
        if sides != (self.window_size,) * 2:
            raise ShapeError(
                f"x: a grid of {height} x {width} is {sides[0]} x {sides[1]} after {self.num_downsamples} poolings, "
                f"expected the window size {self.window_size}"
            )

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        input_resolution: int,
        image_resolution: int,
        window_size: int,
        num_heads: int,
    ) -> "GlobalQueryGenerator":
        """The published ``GlobalQueryGen``, whose poolings depend on the stage: 3, 2, 0, 0."""
        strides = [image_resolution // s for s in (4, 8, 16, 32)]
        if input_resolution not in strides:
            raise ArgumentError(f"input_resolution: expected one of {strides}, got {input_resolution}")
        module = cls(dim, num_heads, window_size, (3, 2, 0, 0)[strides.index(input_resolution)])
        count = len(module.convs)
        rename = {f"to_q_global.{i}.{a}": f"convs.{i}.{b}" for i in range(count) for a, b in FUSED_CONV.items()}
        load_strictly(module, state_dict, rename)
        return module


class GlobalWindowAttention(PartitionAttention):
    """Attention inside windows with queries that all windows share (GC ViT, arXiv:2206.09959).

        y = Wo softmax(q_global kᵀ / √D + bias) v        per window, k and v of its own tokens

    forward(x, q_global): x (B, H, W, C) to the same, q_global (B, heads, w², D) from `GlobalQueryGenerator`. What is
    shared carries information from the whole image into every window; tokens at the same place in their windows ask
    the same. Exact, noncausal. `LocalWindowAttention` is the layer with which it takes turns.

    Args:
        dim: C.
        num_heads: heads.
        window_size: w; must divide H and W.
        qkv_bias, proj_bias: whether the projections have biases.
        relative_bias: whether scores get a learned number per offset and head.

    Raises:
        ShapeError: the windows do not divide the grid, or q_global does not fit.
    """

    cost: ClassVar[str] = "O(N w² C)"
    tokens: ClassVar[str] = "(h p) (w q)"
    argument: ClassVar[str] = "window_size"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        relative_bias: bool = True,
    ):
        super().__init__(dim, num_heads, window_size, qkv_bias, proj_bias, relative_bias, projections=2)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:  # type: ignore[override]
        self._check(x)
        expected = (x.shape[0], self.num_heads, self.size[0] * self.size[1], self.dim // self.num_heads)
        if tuple(q_global.shape) != expected:
            raise ShapeError(f"q_global: expected {expected}, got {tuple(q_global.shape)}")
        key, value = self._heads(x)
        query = q_global.repeat_interleave(key.shape[0] // x.shape[0], 0)
        return self._mix(query, key, value, x)

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, dim: int, num_heads: int, window_size: int, qkv_bias: bool = True
    ) -> "GlobalWindowAttention":
        """The published ``WindowAttentionGlobal``."""
        module = cls(dim, num_heads, window_size, qkv_bias)
        load_window_attention(module, state_dict)
        return module


class LocalWindowAttention(BlockAttention):
    """Attention inside windows with queries of their own, as in Swin: `BlockAttention` by GC ViT's name for it.

    x (B, H, W, C) to the same; see there for the arguments.
    """

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, dim: int, num_heads: int, window_size: int, qkv_bias: bool = True
    ) -> "LocalWindowAttention":
        """The published ``WindowAttention``."""
        module = cls(dim, num_heads, window_size, qkv_bias)
        load_window_attention(module, state_dict)
        return module


def load_window_attention(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load published window attention; its index is computed here."""
    state = {name: t for name, t in state.items() if name != "relative_position_index"}
    load_strictly(module, state, {"relative_position_bias_table": "rel_pos.table"})
