"""MALA's vision backbone (arXiv:2507.00698): linear attention where images are large, softmax where they are small."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.layers import load_strictly
from regard.layers.conv_mlp import ConvMLP
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.layers.scale import LayerScale
from regard.mechanisms.linear.mala import GridMagnitudeAwareAttention, halves_of_rows_and_columns
from regard.models.vision.backbone import Backbone, check_stages


class MalaBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, linear: bool, mlp_ratio: float, drop_path: float, layer_scale: float | None
    ):
        super().__init__()
        self.pos = DepthwiseConv2d(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = GridMagnitudeAwareAttention(dim, num_heads, linear)
        self.ffn = ConvMLP(dim, int(dim * mlp_ratio))
        scales = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.scale1, self.scale2 = scales
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x))))


class MALA(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A convolutional stem (stride 4), four stages with convolutions of stride 2 between them, a projection with Swish,
    and the mean over the image.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths, num_heads: of each stage.
        linear: which stages have linear attention; the others have softmax.
        mlp_ratio: width of the MLPs.
        projection: channels before the pooling.
        drop_path_rate: of the last block; rises linearly from 0.
        layer_scale: initial scale of the branches of each stage, None for none.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "mala-tiny": {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)},
        "mala-small": {
            "dims": (64, 128, 320, 512),
            "depths": (3, 5, 9, 3),
            "num_heads": (1, 2, 5, 8),
            "drop_path_rate": 0.15,
        },
        "mala-base": {
            "dims": (96, 192, 384, 512),
            "depths": (4, 6, 12, 6),
            "num_heads": (1, 2, 6, 8),
            "drop_path_rate": 0.4,
            "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        },
        "mala-large": {
            "dims": (96, 192, 448, 640),
            "depths": (4, 7, 19, 8),
            "num_heads": (1, 2, 7, 10),
            "drop_path_rate": 0.55,
            "projection": 2560,
            "layer_scale": (1e-6,) * 4,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        linear: Sequence[bool] = (True, True, False, False),
        mlp_ratio: float | Sequence[float] = 3.5,
        projection: int = 2048,
        drop_path_rate: float = 0.1,
        layer_scale: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, int | float) else list(mlp_ratio)
        check_stages(
            stages, depths=depths, num_heads=num_heads, linear=linear, mlp_ratio=ratios, layer_scale=layer_scale
        )
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, projection
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        half, full = dims[0] // 2, dims[0]
        stem: list[nn.Module] = []
        for dim_in, dim_out, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, full, 2)):
            stem += [Conv2d(dim_in, dim_out, 3, stride), BatchNorm2d(dim_out), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-1])
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(MalaBlock(dims[i], num_heads[i], linear[i], ratios[i], rate, layer_scale[i]) for rate in rates[i])
            )
            for i in range(stages)
        )
        self.downsamples = nn.ModuleList(
            nn.Sequential(Conv2d(before, after, 3, 2), BatchNorm2d(after)) for before, after in pairwise(dims)
        )
        self.proj = nn.Linear(dims[-1], projection)
        self.norm = BatchNorm2d(projection)
        self.act = nn.SiLU()
        self.head = nn.Linear(projection, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.proj(x))).mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        flagss: Sequence[Sequence[str]] | None = None,
        mlp_ratios: Sequence[float] = (3.5,) * 4,
        drop_path_rate: float = 0.1,
        projection: int = 1024,
        layerscales: Sequence[bool] = (False,) * 4,
        layer_init_values: Sequence[float] = (1e-6,) * 4,
    ) -> "MALA":
        """Weights and arguments of the published ``MALA``; ``flagss`` says "l" or "v" for each block of a stage."""
        kinds = [set(flags) for flags in flagss] if flagss is not None else [{"l"}, {"l"}, {"v"}, {"v"}]
        if any(len(kind) != 1 or not kind <= {"l", "v"} for kind in kinds):
            raise ArgumentError(f"flagss: expected 'l' or 'v', the same in a stage, got {flagss!r}")
        model = cls(
            num_classes,
            in_chans,
            embed_dims,
            depths,
            num_heads,
            [kind == {"l"} for kind in kinds],
            mlp_ratios,
            projection,
            drop_path_rate,
            [value if used else None for value, used in zip(layer_init_values, layerscales, strict=True)],
        )
        state = {name: t for name, t in state_dict.items() if ".RoPE." not in name}  # angles are computed
        rename = {"patch_embed.proj": "stem"}
        for i, depth in enumerate(depths):
            rename |= {f"layers.{i}.downsample.reduction": f"downsamples.{i}.0"}
            rename |= {f"layers.{i}.downsample.norm": f"downsamples.{i}.1"}
            for j in range(depth):
                old, new = f"layers.{i}.blocks.{j}", f"stages.{i}.{j}"
                state = halves_of_rows_and_columns(state, num_heads[i], f"{old}.attn.")
                rename |= {old: new}
                for n in "12":
                    rename |= {f"{old}.norm{n}.norm": f"{new}.norm{n}", f"{old}.gamma_{n}": f"{new}.scale{n}.gamma"}
                    if (gamma := state.get(f"{old}.gamma_{n}")) is not None:
                        state[f"{old}.gamma_{n}"] = gamma.flatten()
        load_strictly(model, state, rename)
        return model
