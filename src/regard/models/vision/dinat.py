"""NAT (arXiv:2204.07143) and DiNAT (arXiv:2209.15001): neighborhood attention, by turns with its dilated form."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, load_strictly
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.layers.scale import LayerScale
from regard.mechanisms.grid.neighborhood import NeighborhoodAttention
from regard.models.vision.backbone import Backbone


class DinatBlock(nn.Module):
    """``x += γ1 DiNA(LN x); x += γ2 MLP(LN x)`` on (B, H, W, C); γ only with layer_scale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        qkv_bias: bool,
        scale: float | None,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, rel_pos_bias=True, qkv_bias=qkv_bias, scale=scale
        )
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        scales = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.scale1, self.scale2 = scales
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class PatchMerging(nn.Module):
    """Linear(LN(four neighbours)), as in Swin: (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchEmbed(Conv2d):
    """Patches of ``size`` pixels a side to vectors; zeros fill up the last ones at the bottom and right."""

    def __init__(self, in_chans: int, dim: int, size: int):
        super().__init__(in_chans, dim, size, size, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        size = self.stride[0]
        return super().forward(F.pad(x, (0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size)))


_DEEP = ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)
_DEEP_384 = ((1, 13, 1), (1, 6, 1, 6), (1, 3) * 9, (1,) * 5)
_SWIN = ((1, 8), (1, 4), (1, 2) * 9, (1, 1))
_SWIN_384 = ((1, 13), (1, 6), (1, 3) * 9, (1, 1))
_MINI: dict[str, Any] = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_TINY = _MINI | {"depths": (3, 4, 18, 5)}
_SMALL = _TINY | {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE = _SMALL | {
    "embed_dim": 128,
    "num_heads": (4, 8, 16, 32),
    "drop_path_rate": 0.5,
    "layer_scale": 1e-5,
}
_LARGE = _SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_S_TINY: dict[str, Any] = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 4.0,
    "conv_stem": False,
}
_S_SMALL = _S_TINY | {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_S_LARGE = _S_SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}


class DiNAT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    Stages of neighborhood attention with relative position biases, dilated in every other block; two 3×3 convolutions
    of stride 2 before, one between stages, and the mean over the image. With ``conv_stem=False`` patches and patch
    merging in their place (DiNAT_s, the layout of Swin). Without dilations it is NAT.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dim: channels of the first stage; they double with every stage.
        depths, num_heads: of each stage.
        kernel_size: of the neighbourhoods.
        dilations: of each block of each stage, None for 1 everywhere. A stage's map must hold dilation · kernel_size
            tokens in height and width.
        mlp_ratio: width of the MLPs.
        drop_path_rate: of the last block; rises linearly from 0.
        layer_scale: initial scale of the branches, None for none.
        conv_stem: see above.
        patch_size: of the patches with conv_stem=False.
        qkv_bias: of the attention's projection.
        scale: of its scores, 1/√head_dim by default.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "nat-mini": _MINI,
        "nat-tiny": _TINY,
        "nat-small": _SMALL | {"layer_scale": 1e-5},
        "nat-base": _BASE,
        "dinat-mini": _MINI | {"dilations": (*_DEEP[:2], (1, 2) * 3, _DEEP[3])},
        "dinat-tiny": _TINY | {"dilations": _DEEP},
        "dinat-small": _SMALL | {"dilations": _DEEP},
        "dinat-base": _BASE | {"dilations": _DEEP},
        "dinat-large": _LARGE | {"dilations": _DEEP},
        "dinat-large-384": _LARGE | {"dilations": _DEEP_384},
        "dinat-large-384-11x11": _LARGE | {"dilations": _DEEP, "kernel_size": 11},
        "dinat-s-tiny": _S_TINY | {"dilations": (*_SWIN[:2], (1, 2) * 3, _SWIN[3])},
        "dinat-s-small": _S_SMALL | {"dilations": _SWIN},
        "dinat-s-base": _S_SMALL
        | {"dilations": _SWIN, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
        "dinat-s-large": _S_LARGE | {"dilations": _SWIN},
        "dinat-s-large-384": _S_LARGE | {"dilations": _SWIN_384},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.2,
        layer_scale: float | None = None,
        conv_stem: bool = True,
        patch_size: int = 4,
        qkv_bias: bool = True,
        scale: float | None = None,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(depths)
        spread = [[1] * depth for depth in depths] if dilations is None else dilations
        if len(num_heads) != stages:
            raise ArgumentError(f"num_heads: expected one for each of {stages} stages, got {len(num_heads)}")
        if [len(each) for each in spread] != list(depths):
            raise ArgumentError(f"dilations: expected one for each block of stages of {depths} blocks, got {dilations}")
        dims = [embed_dim * 2**i for i in range(stages)]
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        first = 4 if conv_stem else patch_size
        self.channels, self.strides = tuple(dims), tuple(first * 2**i for i in range(stages))
        self.least = tuple(kernel_size * max(each, default=0) for each in spread)
        self.features_only = features_only
        embed: list[nn.Module] = [PatchEmbed(in_chans, embed_dim, patch_size)]
        if conv_stem:
            embed = [Conv2d(in_chans, embed_dim // 2, 3, 2), Conv2d(embed_dim // 2, embed_dim, 3, 2)]
        self.stem = nn.Sequential(*embed, nn.LayerNorm(embed_dim))
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    DinatBlock(dims[i], num_heads[i], kernel_size, gap, mlp_ratio, rate, layer_scale, qkv_bias, scale)
                    for gap, rate in zip(spread[i], rates[i], strict=True)
                )
            )
            for i in range(stages)
        )
        self.downsamples = nn.ModuleList(
            nn.Sequential(Conv2d(before, after, 3, 2, bias=False), nn.LayerNorm(after))
            if conv_stem
            else PatchMerging(before)
            for before, after in pairwise(dims)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images.movedim(1, -1))
        features = []
        for i, stage in enumerate(self.stages):
            x = x if i == 0 else self.downsamples[i - 1](x)
            if min(x.shape[1:3]) < self.least[i]:
                raise ShapeError(
                    f"images: stage {i} has {x.shape[1]} x {x.shape[2]} tokens of an image of {images.shape[2]} x "
                    f"{images.shape[3]}, expected at least {self.least[i]} a side (kernel_size times dilation)"
                )
            x = stage(x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        embed_dim: int | None = None,
        mlp_ratio: float = 4.0,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        patch_size: int = 4,
        **_: Any,
    ) -> "DiNAT":
        """Weights of the published ``NAT``, ``DiNAT`` or ``DiNAT_s``; which one, their names say."""
        conv_stem = any(name.startswith("levels.") for name in state_dict)
        model = cls(
            num_classes,
            in_chans,
            96 if embed_dim is None else embed_dim,
            depths,
            num_heads,
            kernel_size,
            dilations,
            mlp_ratio,
            drop_path_rate,
            layer_scale,
            conv_stem,
            patch_size,
            qkv_bias,
            qk_scale,
        )
        old = "levels" if conv_stem else "layers"
        rename = {"patch_embed.proj": "stem", "patch_embed.norm": "stem.2"}
        if not conv_stem:
            rename = {"patch_embed.proj": "stem.0", "patch_embed.norm": "stem.1"}
        for i, depth in enumerate(depths):
            reduction, norm = ("0", "1") if conv_stem else ("reduction", "norm")
            rename |= {f"{old}.{i}.downsample.reduction": f"downsamples.{i}.{reduction}"}
            rename |= {f"{old}.{i}.downsample.norm": f"downsamples.{i}.{norm}"}
            for j in range(depth):
                rename |= {f"{old}.{i}.blocks.{j}": f"stages.{i}.{j}"}
                rename |= {f"{old}.{i}.blocks.{j}.gamma{n}": f"stages.{i}.{j}.scale{n}.gamma" for n in (1, 2)}
        load_strictly(model, state_dict, rename)
        return model
