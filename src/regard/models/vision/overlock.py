"""OverLoCK (arXiv:2502.20087): an overview of the image tells a second network where to look closely."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN
from regard.layers.grid import BatchNorm2d, Conv2d, drop_path_rates
from regard.layers.large_kernel import published_names
from regard.models.vision.backbone import Backbone
from regard.models.vision.overlock_blocks import ContMixBlock, RepConvBlock, ScaleShift, contmix_names, flat, merge


class FocusBlock(nn.Module):
    """`ContMixBlock` on x (B, H, W, C) and a context (B, H, W, C'), which is first mixed with the overview's."""

    def __init__(self, dim: int, context_dim: int, first: bool = False, **block: Any):
        super().__init__()
        self.x_scale, self.h_scale = (None if first else ScaleShift(context_dim, 1.0) for _ in range(2))
        self.block = ContMixBlock(dim, context_dim=context_dim, **block)

    def forward(self, x: Tensor, context: Tensor, overview: Tensor) -> tuple[Tensor, Tensor]:
        if self.x_scale is not None and self.h_scale is not None:
            context = self.x_scale(context) + self.h_scale(overview)
        sizes = [x.shape[-1], context.shape[-1]]
        x, context = self.block(torch.cat([x, context], -1)).split(sizes, -1)
        return x, context


class OverLoCK(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    Convolutional blocks reduce the image to stride 16 (base network) and on to stride 32, where the result, the
    overview, becomes a context. The focus network starts again at stride 16 with that context, which its blocks use
    and change. Stage outputs are those of the base network at strides 4 and 8, and of the focus network; the last has
    the context as its last channels.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths, kernel_sizes, mlp_ratios: of the base and overview network's four stages.
        sub_depths, sub_mlp_ratios, num_heads: of the focus network's two; its kernels are those of stages 3 and 4.
        small_kernel_size: of the small dynamic kernels.
        projection: channels before the pooling.
        layer_scale: of each stage, None for none; see `Residual`.
        scale_shortcut: see `Residual`.
        auxiliary: a second classifier on the overview; training then gives {"main": logits, "aux": logits}.
        merged: large-kernel convolutions begin as one, see `reparameterize`.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "overlock-xt": {
            "dims": (56, 112, 256, 336),
            "depths": (2, 2, 3, 2),
            "sub_depths": (6, 2),
            "num_heads": (4, 6),
            "auxiliary": True,
        },
        "overlock-t": {
            "dims": (64, 128, 256, 512),
            "depths": (4, 4, 6, 2),
            "sub_depths": (12, 2),
            "num_heads": (4, 8),
            "auxiliary": True,
        },
        "overlock-s": {
            "dims": (64, 128, 320, 512),
            "depths": (6, 6, 8, 3),
            "sub_depths": (16, 3),
            "num_heads": (8, 16),
            "auxiliary": True,
        },
        "overlock-b": {
            "dims": (80, 160, 384, 576),
            "depths": (8, 8, 10, 4),
            "sub_depths": (20, 4),
            "num_heads": (6, 9),
            "auxiliary": True,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (4, 4, 6, 2),
        sub_depths: Sequence[int] = (12, 2),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        sub_mlp_ratios: Sequence[float] = (3, 3),
        num_heads: Sequence[int] = (4, 8),
        small_kernel_size: int = 5,
        projection: int = 1024,
        layer_scale: Sequence[float | None] = (None, None, 1.0, 1.0),
        scale_shortcut: bool = True,
        auxiliary: bool = False,
        merged: bool = False,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        for name, given, count in (
            *(("dims", dims, 4), ("depths", depths, 4), ("kernel_sizes", kernel_sizes, 4)),
            *(("mlp_ratios", mlp_ratios, 4), ("layer_scale", layer_scale, 4), ("sub_depths", sub_depths, 2)),
            *(("sub_mlp_ratios", sub_mlp_ratios, 2), ("num_heads", num_heads, 2)),
        ):
            if len(given) != count:
                raise ArgumentError(f"{name}: expected one for each of {count} stages, got {len(given)}")
        if min(sub_depths) < 1:
            raise ArgumentError(f"sub_depths: expected at least 1 each, got {tuple(sub_depths)}")
        context_dim = dims[3] // 4
        both = dims[3] + context_dim
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, projection
        self.channels, self.strides, self.features_only = (*dims[:3], both), (4, 8, 16, 32), features_only
        half = dims[0] // 2
        self.downsamples = nn.ModuleList(
            [
                nn.Sequential(
                    *(ConvBN(in_chans, half, 3, 2), nn.GELU(), ConvBN(half, half, 3), nn.GELU()),
                    *(ConvBN(half, dims[0], 3, 2), nn.GELU(), ConvBN(dims[0], dims[0], 3)),
                ),
                *(ConvBN(dims[i], dims[i + 1], 3, 2) for i in range(3)),
            ]
        )
        *rates, rates3, rates4 = drop_path_rates(drop_path_rate, (*depths, *sub_depths))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    RepConvBlock(dims[i], kernel_sizes[i], mlp_ratios[i], layer_scale[i], scale_shortcut, rate, merged)
                    for rate in rates[i]
                )
            )
            for i in range(4)
        )
        self.context_proj = nn.Linear(dims[3], context_dim)
        self.focus_downsample = ConvBN(dims[2], dims[3], 3, 2)
        self.context_downsample = ConvBN(context_dim, context_dim, 3, 2)
        self.focus = nn.ModuleList(
            nn.ModuleList(
                FocusBlock(
                    dims[stage],
                    context_dim,
                    first=stage == 2 and block == 0,
                    kernel_size=kernel_sizes[stage],
                    small_kernel_size=small_kernel_size,
                    num_heads=num_heads[stage - 2],
                    mlp_ratio=sub_mlp_ratios[stage - 2],
                    scale_shortcut=scale_shortcut,
                    layer_scale=layer_scale[stage],
                    drop_path=rate,
                    merged=merged,
                )
                for block, rate in enumerate(block_rates)
            )
            for stage, block_rates in ((2, rates3), (3, rates4))
        )
        self.proj = nn.Sequential(ConvBN(both, projection), nn.SiLU())
        self.head = nn.Linear(projection, num_classes) if num_classes else nn.Identity()
        self.aux_norm = BatchNorm2d(dims[3]) if auxiliary else None
        self.aux_head = nn.Linear(dims[3], num_classes) if auxiliary and num_classes else None
        for module in self.modules():
            if isinstance(module, nn.Linear | Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Any:
        if self.aux_head is None or self.aux_norm is None or self.features_only or not self.training:
            return super().forward(images)
        features, overview = self._features(images)
        return {"main": self.forward_head(features[-1]), "aux": self.aux_head(self.aux_norm(overview).mean((1, 2)))}

    def forward_features(self, images: Tensor) -> list[Tensor]:
        return self._features(images)[0]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.proj(x).mean((1, 2)))

    def _features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The stages' outputs, and the overview (B, H / 32, W / 32, dims[3])."""
        x = images.movedim(1, -1)
        base = []
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x))
            base.append(x)
        *shallow, x, overview = base
        coarse = self.context_proj(overview)
        fine = F.interpolate(coarse.movedim(-1, 1), x.shape[1:3], mode="bilinear").movedim(1, -1)
        third, fourth = self.focus
        context = fine
        for block in third:  # type: ignore[attr-defined]
            x, context = block(x, context, fine)
        features = [*shallow, x]
        x, context = self.focus_downsample(x), self.context_downsample(context)
        for block in fourth:  # type: ignore[attr-defined]
            x, context = block(x, context, coarse)
        return [*features, torch.cat([x, context], -1)], overview

    def reparameterize(self) -> Self:
        """Merge the large-kernel convolutions, in place, for inference: the logits stay the same."""
        merge(self)
        return self

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        depth: Sequence[int] = (2, 2, 2, 2),
        sub_depth: Sequence[int] = (4, 2),
        in_chans: int = 3,
        embed_dim: Sequence[int] = (96, 192, 384, 768),
        kernel_size: Sequence[int] = (7, 7, 7, 7),
        mlp_ratio: Sequence[float] = (4, 4, 4, 4),
        sub_mlp_ratio: Sequence[float] = (4, 4),
        sub_num_heads: Sequence[int] = (4, 8),
        ls_init_value: Sequence[float | None] = (None, None, 1, 1),
        res_scale: bool = True,
        smk_size: int = 5,
        deploy: bool = False,
        use_ds: bool = True,
        drop_path_rate: float = 0.0,
        projection: int = 1024,
        num_classes: int = 1000,
        **_: Any,
    ) -> "OverLoCK":
        """Weights and arguments of the published ``OverLoCK``; with ``deploy`` its merged convolutions."""
        model = cls(
            num_classes,
            in_chans,
            embed_dim,
            depth,
            sub_depth,
            kernel_size,
            mlp_ratio,
            sub_mlp_ratio,
            sub_num_heads,
            smk_size,
            projection,
            ls_init_value,
            res_scale,
            use_ds,
            deploy,
            drop_path_rate,
        )
        rename = {
            "high_level_proj": "context_proj",
            "head.4": "head",
            "aux_head.0": "aux_norm",
            "aux_head.2": "aux_head",
        }
        for i, own in enumerate(("conv", "bn")):
            rename |= {f"head.{i}": f"proj.0.{own}"}
            rename |= {f"patch_embedx.x_proj.{i}": f"focus_downsample.{own}"}
            rename |= {f"patch_embedx.h_proj.{i}": f"context_downsample.{own}"}
            rename |= {f"patch_embed1.{3 * n + i}": f"downsamples.0.{2 * n}.{own}" for n in range(4)}
            rename |= {f"patch_embed{n + 1}.{i}": f"downsamples.{n}.{own}" for n in range(1, 4)}
        for i in range(4):
            for j in range(depth[i]):
                old, new = f"blocks{i + 1}.{j}", f"stages.{i}.{j}"
                rename |= {f"{old}.dwconv": f"{new}.conv", f"{old}.ls": f"{new}.residual.scale"}
                rename |= {f"{old}.proj.{n}": f"{new}.branch.{n}" for n in (0, 2)}
                rename |= {f"{old}.proj.3.proj.{n}": f"{new}.branch.3.{fc}" for n, fc in ((1, "fc1"), (3, "fc2"))}
                rename |= {f"{old}.proj.{n + 4}": f"{new}.branch.4.{n}" for n in range(5)}
                rename |= published_names(f"{old}.proj.1", f"{new}.branch.1", kernel_size[i], deploy)
        for i in range(2):
            for j in range(sub_depth[i]):
                old, new = f"sub_blocks{i + 3}.{j}.", f"focus.{i}.{j}."
                rename |= {f"{old}{scale}": f"{new}{scale}" for scale in ("x_scale", "h_scale")}
                rename |= contmix_names(old, f"{new}block.", kernel_size[i + 2], deploy)
        load_strictly(model, flat(state_dict), rename)
        return model
