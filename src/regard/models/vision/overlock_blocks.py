"""The blocks of OverLoCK (arXiv:2502.20087), of which `ContMixBlock` works in any network."""

from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN
from regard.layers.grid import BatchNorm2d, DepthwiseConv2d, DropPath
from regard.layers.large_kernel import LargeKernelConv, published_names
from regard.layers.response_norm import GlobalResponseNorm
from regard.layers.squeeze_excite import SqueezeExcite
from regard.mechanisms.grid.contmix import ContMix


class ResidualConv(DepthwiseConv2d):
    """``x + conv(x)``, depthwise 3×3."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ScaleShift(nn.Module):
    """``w ∘ x + b`` per channel."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((dim,), float(init))), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Residual(nn.Module):
    """``scale(x) + y``, or with ``scale_shortcut=False`` ``x + scale(y)``; without a scale ``x + y``."""

    def __init__(self, dim: int, layer_scale: float | None, scale_shortcut: bool, drop_path: float):
        super().__init__()
        self.scale = nn.Identity() if layer_scale is None else ScaleShift(dim, layer_scale)
        self.scale_shortcut, self.drop_path = scale_shortcut, DropPath(drop_path)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.scale_shortcut:
            return self.scale(x) + self.drop_path(y)
        return x + self.drop_path(self.scale(y))


def conv_mlp(dim: int, hidden_dim: int) -> nn.Sequential:
    """An MLP with a residual convolution and `GlobalResponseNorm` between its layers."""
    return nn.Sequential(
        *(nn.Linear(dim, hidden_dim), nn.GELU(), ResidualConv(hidden_dim), GlobalResponseNorm(hidden_dim)),
        nn.Linear(hidden_dim, dim),
    )


def squeeze_excite(dim: int) -> SqueezeExcite:
    return SqueezeExcite(dim, max(16, dim // 8), nn.GELU)


class RepConvBlock(nn.Module):
    """A large-kernel convolution and an MLP in one residual branch, after a small residual convolution."""

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        scale_shortcut: bool = False,
        drop_path: float = 0.0,
        merged: bool = False,
    ):
        super().__init__()
        self.conv = ResidualConv(dim)
        self.branch = nn.Sequential(
            *(nn.LayerNorm(dim, eps=1e-6), LargeKernelConv(dim, kernel_size, merged), BatchNorm2d(dim)),
            *(squeeze_excite(dim), conv_mlp(dim, int(dim * mlp_ratio))),
        )
        self.residual = Residual(dim, layer_scale, scale_shortcut, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.residual(x, self.branch(x))


class ContMixBlock(nn.Module, PyTorchModelHubMixin):
    """Gated `ContMix` beside a large-kernel convolution, then an MLP; (B, H, W, C) to the same, at any size.

        u = LN(x + conv(x))        y = x + (SE(contmix(u) + BN(large(u))) ∘ SiLU(BN(u Wg))) Wo       MLP likewise

    With ``context_dim`` the last channels of x are a context: u is fused from both for gate, convolution and values,
    queries come from the one and keys from the other part. That is the block of OverLoCK itself.

    Args:
        dim: C, without the context.
        kernel_size, small_kernel_size, num_heads: see `ContMix`.
        mlp_ratio: width of the MLP over ``dim``.
        scale_shortcut, layer_scale: see `Residual`; None for no scale.
        drop_path: chance of losing a branch in training.
        context_dim: channels of the context.
        merged: large-kernel convolutions begin as one, see `LargeKernelConv`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        scale_shortcut: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        context_dim: int = 0,
        merged: bool = False,
    ):
        super().__init__()
        if context_dim < 0:
            raise ArgumentError(f"context_dim: expected at least 0, got {context_dim}")
        both = dim + context_dim
        self.dim, self.context_dim = dim, context_dim
        self.conv1, self.norm1 = ResidualConv(both), nn.LayerNorm(both, eps=1e-6)
        self.fusion: nn.Module = nn.Identity()
        mixer: dict[str, Any] = {}
        if context_dim:
            self.fusion = nn.Sequential(
                *(DepthwiseConv2d(both), BatchNorm2d(both), nn.GELU(), nn.Linear(both, dim), GlobalResponseNorm(dim))
            )
            mixer = {"context_dim": context_dim, "value_proj": False, "bias_std": 0.0}
        self.mixer = ContMix(dim, kernel_size, small_kernel_size, num_heads, **mixer)
        self.large = nn.Sequential(LargeKernelConv(dim, kernel_size, merged), BatchNorm2d(dim))
        self.se = squeeze_excite(dim)
        self.gate = nn.Sequential(ConvBN(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(BatchNorm2d(dim), nn.Linear(dim, both))
        self.residual1 = Residual(both, layer_scale, scale_shortcut, drop_path)
        self.conv2, self.norm2 = ResidualConv(both), nn.LayerNorm(both, eps=1e-6)
        self.mlp = conv_mlp(both, int(dim * mlp_ratio))
        self.residual2 = Residual(both, layer_scale, scale_shortcut, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        u = self.norm1(x)
        fused = self.fusion(u)
        query, context = (u, None) if not self.context_dim else u.split([self.dim, self.context_dim], -1)
        mixed = self.se(self.mixer(query, context, fused) + self.large(fused))
        x = self.conv2(self.residual1(x, self.proj(mixed * self.gate(fused))))
        return self.residual2(x, self.mlp(self.norm2(x)))

    def reparameterize(self) -> Self:
        """Merge the large-kernel convolutions, in place, for inference."""
        merge(self)
        return self

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int = 64,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        **_: Any,
    ) -> "ContMixBlock":
        """The published plug-and-play ``ContMixBlock``."""
        block = cls(
            dim, kernel_size, smk_size, num_heads, mlp_ratio, res_scale, ls_init_value, drop_path, merged=deploy
        )
        load_strictly(block, flat(state_dict), contmix_names("", "", kernel_size, deploy))
        return block


def merge(model: nn.Module) -> None:
    """Merge all large-kernel convolutions of a model, in place; saved models remember it."""
    for module in list(model.modules()):
        if isinstance(module, LargeKernelConv):
            module.merge()
    config = getattr(model, "_hub_mixin_config", None)
    if isinstance(config, dict):
        config["merged"] = True


def flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published per-channel vectors have extra dimensions: (C, 1, 1, 1) of scales and (1, C, 1, 1) of norms."""
    vectors = (".gamma", ".beta")
    return {name: t.flatten() if name.endswith(vectors) or t.shape[1:] == (1, 1, 1) else t for name, t in state.items()}


def contmix_names(old: str, new: str, kernel_size: int, merged: bool = False) -> dict[str, str]:
    """Prefixes of the weights of published blocks with dynamic kernels, and ours."""
    names = {
        **{"dwconv1": "conv1", "dwconv2": "conv2", "se_layer.proj.1": "se.fc1", "se_layer.proj.3": "se.fc2"},
        **{"gate.0": "gate.0.conv", "gate.1": "gate.0.bn", "ls1": "residual1.scale", "ls2": "residual2.scale"},
        **{"weight_query.0": "mixer.query.conv", "weight_query.1": "mixer.query.bn"},
        **{"weight_key.1": "mixer.key.conv", "weight_key.2": "mixer.key.bn"},
        **{"weight_value.0": "mixer.value.conv", "weight_value.1": "mixer.value.bn"},
        **{"weight_proj": "mixer.kernel_proj", "rpb1": "mixer.small_bias", "rpb2": "mixer.large_bias"},
        **{"fusion_proj.0": "mixer.proj.conv", "fusion_proj.1": "mixer.proj.bn"},
        **{"dyconv_proj.0": "mixer.proj.conv", "dyconv_proj.1": "mixer.proj.bn"},
        **{"lepe.1": "large.1", "norm1": "norm1", "norm2": "norm2", "fusion": "fusion", "proj": "proj", "mlp": "mlp"},
        **published_names("lepe.0", "large.0", kernel_size, merged),
    }
    return {f"{old}{name}": f"{new}{own}" for name, own in names.items()}
