"""SegMAN's encoder (arXiv:2412.11890): neighbourhoods and scans, in the last stage neighbourhoods and attention."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ShapeError, Unsupported
from regard.layers import load_strictly
from regard.layers.conv_mlp import ConvMLP
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.layers.scale import LayerScale
from regard.mechanisms.grid.lass import LASS, PUBLISHED, one_side, published_lass, with_batch_counts
from regard.mechanisms.grid.selective import SelectiveScan2d
from regard.models.vision.backbone import Backbone, check_stages


class SegMANBlock(nn.Module):
    """``x += conv(x); x += s₁ mixer(LN x); x += conv(x); x += s₂ ConvMLP(LN x)`` on (B, H, W, C)."""

    def __init__(
        self,
        mixer: LASS | SelectiveScan2d,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        dim = mixer.dim
        self.cpe1, self.cpe2 = DepthwiseConv2d(dim), DepthwiseConv2d(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.mlp = ConvMLP(dim, int(mlp_ratio * dim))
        scales = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, bias=True) for _ in range(2))
        self.scale1, self.scale2 = scales
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class SegMANEncoder(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size whose stages hold a neighbourhood.

    A convolutional stem (stride 4), stages of `LASS` blocks with convolutions of stride 2 between them, a projection
    with Swish, and the mean over the image. Global stages have a table for one size of image, and interpolate it for
    others, see `LASS`.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        image_size: height and width, or one number for both, of the images for which tables are made.
        embed_dims, depths, num_heads, mlp_ratios: of each stage.
        kernel_sizes, dilations: of each stage's neighbourhood.
        global_stages: which stages attend to the whole image in place of scanning it.
        rel_pos_bias: learned biases of relative positions and of pairs.
        projection: channels before the pooling.
        drop_path_rate: of the last block; rises linearly from 0.
        layer_scale: initial scale of the branches of each stage, None for none.
        features_only: give the stages' feature maps, see `Backbone`; then there is no projection either.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "segman-encoder-tiny": {
            "embed_dims": (32, 64, 144, 192),
            "depths": (2, 2, 4, 2),
            "num_heads": (1, 2, 4, 8),
            "kernel_sizes": (11, 9, 9, 7),
        },
        "segman-encoder-small": {"mlp_ratios": (4, 4, 3.4, 3.4)},
        "segman-encoder-base": {
            "embed_dims": (96, 160, 364, 560),
            "depths": (4, 4, 18, 4),
            "num_heads": (4, 8, 13, 20),
            "layer_scale": (1e-6,) * 4,
        },
        "segman-encoder-large": {
            "embed_dims": (96, 192, 432, 640),
            "depths": (4, 4, 28, 4),
            "num_heads": (4, 8, 12, 20),
            "layer_scale": (1e-6,) * 4,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        image_size: int | Sequence[int] = 224,
        embed_dims: Sequence[int] = (64, 144, 288, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_sizes: Sequence[int] = (11, 9, 7, 7),
        dilations: Sequence[int] | None = None,
        global_stages: Sequence[bool] = (False, False, False, True),
        rel_pos_bias: bool = True,
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        projection: int = 1024,
        drop_path_rate: float = 0.0,
        layer_scale: Sequence[float | None] | None = None,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(embed_dims)
        gaps = [1] * stages if dilations is None else dilations
        scales = [None] * stages if layer_scale is None else layer_scale
        check_stages(
            stages,
            depths=depths,
            num_heads=num_heads,
            kernel_sizes=kernel_sizes,
            dilations=gaps,
            global_stages=global_stages,
            mlp_ratios=mlp_ratios,
            layer_scale=scales,
        )
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, projection
        self.channels, self.strides = tuple(embed_dims), tuple(4 * 2**i for i in range(stages))
        self.least = tuple(kernel * gap for kernel, gap in zip(kernel_sizes, gaps, strict=True))
        self.features_only = features_only
        half, full = embed_dims[0] // 2, embed_dims[0]
        stem: list[nn.Module] = []
        for dim_in, dim_out, stride in ((in_chans, half, 2), (half, half, 1), (half, full, 2), (full, full, 1)):
            stem += [Conv2d(dim_in, dim_out, 3, stride, bias=False), BatchNorm2d(dim_out), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-1])
        rates = drop_path_rates(drop_path_rate, depths)
        sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            grid = [side // self.strides[i] for side in sides]
            mixers = (
                LASS(dim, num_heads[i], kernel_sizes[i], gaps[i], global_stages[i], grid, rel_pos_bias)
                for _ in rates[i]
            )
            blocks = (SegMANBlock(m, mlp_ratios[i], r, scales[i]) for m, r in zip(mixers, rates[i], strict=True))
            self.stages.append(nn.Sequential(*blocks))
        self.downsamples = nn.ModuleList(
            nn.Sequential(Conv2d(before, after, 3, 2, bias=False), BatchNorm2d(after))
            for before, after in pairwise(embed_dims)
        )
        self.proj: nn.Module | None = None
        if not features_only:
            self.proj = nn.Sequential(nn.Linear(embed_dims[-1], projection), BatchNorm2d(projection), nn.SiLU())
            self.head = nn.Linear(projection, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def prepare(self, x: Tensor) -> Tensor:
        for i, (stride, least) in enumerate(zip(self.strides, self.least, strict=True)):
            if -(-min(x.shape[1:3]) // stride) < least:
                raise ShapeError(
                    f"images: expected {least} or more tokens a side in stage {i} (kernel size · dilation), "
                    f"got an image of {x.shape[1]} x {x.shape[2]}"
                )
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        assert self.proj is not None
        return self.head(self.proj(x).mean((1, 2)))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "SegMANEncoder":
        """Weights of the published ``SegMANEncoder``; one without a classifier has ``features_only``."""
        config = published_arguments(**official_kwargs)
        model = cls(**config, features_only=not any(name.startswith("classifier.") for name in state_dict))
        depths, num_heads = config["depths"], config["num_heads"]
        state = {name: t for name, t in state_dict.items() if ".rope." not in name}  # angles are computed
        rename = {"patch_embed": "stem", "classifier": "proj", "classifier.4": "head"}
        for i, depth in enumerate(depths):
            rename |= {f"layers.{2 * i + 1}": f"downsamples.{i}"}
            for j in range(depth):
                old, new = f"layers.{2 * i}.blocks.{j}", f"stages.{i}.{j}"
                state = published_lass(state, num_heads[i], f"{old}.token_mixer.")
                rename |= {old: new, f"{old}.token_mixer": f"{new}.mixer"}
                rename |= {f"{old}.token_mixer.{a}": f"{new}.mixer.{b}" for a, b in PUBLISHED.items()}
                for n in "12":
                    rename |= {f"{old}.layer_scale{n}": f"{new}.scale{n}"}
                    rename |= {f"{old}.layer_scale{n}.weight": f"{new}.scale{n}.gamma"}
                    if (gamma := state.get(f"{old}.layer_scale{n}.weight")) is not None:
                        state[f"{old}.layer_scale{n}.weight"] = gamma.flatten()
        load_strictly(model, with_batch_counts(state), rename)
        return model


def published_arguments(
    *,
    image_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    window_size: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
    window_dilation: Sequence[int | Sequence[int]] = (1, 1, 1, 1),
    use_rpb: bool = False,
    mlp_ratios: Sequence[float] = (4, 4, 4, 4),
    drop_path_rate: float = 0.0,
    projection: int = 1024,
    layerscales: Sequence[bool] = (False, False, False, False),
    layer_init_values: float = 1e-6,
    fused_na: bool = False,
    ssm_ratio: float = 1,
    **_: Any,
) -> dict[str, Any]:
    """Our arguments for those of the published ``SegMANEncoder``.

    Raises:
        Unsupported: see `LASS.from_official`.
    """
    if fused_na or ssm_ratio != 1:
        raise Unsupported(f"fused_na, ssm_ratio: only False and 1, got {fused_na} and {ssm_ratio}")
    stages = len(depths)
    return {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "image_size": image_size,
        "embed_dims": embed_dims[:stages],
        "depths": depths,
        "num_heads": num_heads[:stages],
        "kernel_sizes": [one_side("window_size", size) for size in window_size[:stages]],
        "dilations": [one_side("window_dilation", gap) for gap in window_dilation[:stages]],
        "global_stages": [i == 3 for i in range(stages)],
        "rel_pos_bias": use_rpb,
        "mlp_ratios": mlp_ratios[:stages],
        "projection": projection,
        "drop_path_rate": drop_path_rate,
        "layer_scale": [layer_init_values if used else None for used in layerscales[:stages]],
    }
