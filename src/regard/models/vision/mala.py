"""MALA's vision backbone (arXiv:2507.00698): linear attention where images are large, softmax where they are small."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from regard.errors import ArgumentError
from regard.layers import load_strictly
from regard.mechanisms.linear.mala import GridMagnitudeAwareAttention, halves_of_rows_and_columns
from regard.models.vision.backbone import check_stages
from regard.models.vision.pyramid import Pyramid


class MALA(Pyramid):
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
        stages = len(dims)
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, int | float) else list(mlp_ratio)
        check_stages(
            stages, depths=depths, num_heads=num_heads, linear=linear, mlp_ratio=ratios, layer_scale=layer_scale
        )
        half, full = dims[0] // 2, dims[0]
        super().__init__(
            num_classes,
            in_chans,
            dims,
            depths,
            [partial(GridMagnitudeAwareAttention, *each) for each in zip(dims, num_heads, linear, strict=True)],
            ratios,
            ((half, 2), (half, 1), (half, 1), (full, 2)),
            projection,
            drop_path_rate,
            layer_scale,
            features_only,
        )

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
