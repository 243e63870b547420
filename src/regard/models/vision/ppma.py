"""PPMAViT (arXiv:2506.15940): polyline path masked attention, in lines where images are large, whole where small."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.layers import load_strictly
from regard.mechanisms.grid.polyline import PUBLISHED, PolylinePathAttention, halved
from regard.models.vision.backbone import check_stages
from regard.models.vision.pyramid import Pyramid


class PPMAViT(Pyramid):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A convolutional stem (stride 4), four stages with convolutions of stride 2 between them, a projection with Swish,
    and the mean over the image.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dims, depths, num_heads, mlp_ratios: of each stage.
        forms: "chunk" or "whole" for each stage, see `PolylinePathAttention`.
        projection: channels before the pooling.
        drop_path_rate: of the last block; rises linearly from 0.
        layer_scale: initial scale of the branches of each stage, None for none.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "ppma-tiny": {"mlp_ratios": (3, 3, 3, 3)},
        "ppma-small": {
            "depths": (3, 4, 18, 4),
            "forms": ("chunk", "chunk", "chunk", "whole"),
            "drop_path_rate": 0.15,
        },
        "ppma-base": {
            "embed_dims": (80, 160, 320, 512),
            "depths": (4, 8, 25, 8),
            "num_heads": (5, 5, 10, 16),
            "forms": ("chunk", "chunk", "chunk", "whole"),
            "drop_path_rate": 0.4,
            "layer_scale": (None, None, 1e-6, 1e-6),
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        forms: Sequence[str] = ("chunk", "chunk", "whole", "whole"),
        projection: int = 1024,
        drop_path_rate: float = 0.1,
        layer_scale: Sequence[float | None] | None = None,
        features_only: bool = False,
    ):
        stages = len(embed_dims)
        scales = [None] * stages if layer_scale is None else layer_scale
        check_stages(stages, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, forms=forms, layer_scale=scales)
        half, full = embed_dims[0] // 2, embed_dims[0]
        super().__init__(
            num_classes,
            in_chans,
            embed_dims,
            depths,
            [partial(PolylinePathAttention, *each) for each in zip(embed_dims, num_heads, forms, strict=True)],
            mlp_ratios,
            ((half, 2), (half, 1), (full, 2), (full, 1)),
            projection,
            drop_path_rate,
            scales,
            features_only,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        drop_path_rate: float = 0.1,
        chunkwise_recurrents: Sequence[bool] = (True, True, False, False),
        projection: int = 1024,
        layerscales: Sequence[bool] = (False, False, False, False),
        layer_init_values: float = 1e-6,
        **_: Any,
    ) -> "PPMAViT":
        """Weights and arguments of the published ``PPMAViT``; it reads one entry per stage of what may be longer."""
        stages = len(depths)
        model = cls(
            num_classes,
            in_chans,
            embed_dims[:stages],
            depths,
            num_heads[:stages],
            mlp_ratios[:stages],
            ["chunk" if chunk else "whole" for chunk in chunkwise_recurrents[:stages]],
            projection,
            drop_path_rate,
            [layer_init_values if used else None for used in layerscales[:stages]],
        )
        state = {name: t for name, t in state_dict.items() if ".Relpos." not in name}  # angles are computed
        rename = {"patch_embed.proj": "stem"}
        for i, depth in enumerate(depths):
            rename |= {f"layers.{i}.downsample.reduction": f"downsamples.{i}.0"}
            rename |= {f"layers.{i}.downsample.norm": f"downsamples.{i}.1"}
            for j in range(depth):
                old, new = f"layers.{i}.blocks.{j}", f"stages.{i}.{j}"
                state = halved(state, num_heads[i], f"{old}.retention.")
                rename |= {old: new, f"{old}.retention": f"{new}.attn", f"{old}.pos.conv": f"{new}.pos"}
                rename |= {f"{old}.retention.{a}": f"{new}.attn.{b}" for a, b in PUBLISHED.items()}
                rename |= {f"{old}.ffn.dwconv.conv": f"{new}.ffn.dwconv"}
                rename |= {f"{old}.retention_layer_norm": f"{new}.norm1", f"{old}.final_layer_norm": f"{new}.norm2"}
                for n in "12":
                    rename |= {f"{old}.gamma_{n}": f"{new}.scale{n}.gamma"}
                    if (gamma := state.get(f"{old}.gamma_{n}")) is not None:
                        state[f"{old}.gamma_{n}"] = gamma.flatten()
        load_strictly(model, state, rename)
        return model
