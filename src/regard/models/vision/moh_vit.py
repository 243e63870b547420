"""MoH-ViT (arXiv:2410.11842): TransNeXt whose attentions are mixtures of heads."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.mechanisms.grid.aggregated import CosineAttention
from regard.mechanisms.grid.moh import mixture_of_heads
from regard.models.vision.backbone import check_stages
from regard.models.vision.transnext import TransNeXt, TransNeXtBlock

_SMALL: dict[str, Any] = {"routed_heads": (0, 0, 6, 12)}
_BASE: dict[str, Any] = {
    "embed_dims": (96, 192, 384, 768),
    "num_heads": (4, 8, 16, 32),
    "depths": (5, 5, 23, 5),
    "drop_path_rate": 0.6,
}


class MoHViT(TransNeXt):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at the sizes that TransNeXt takes.

    Every token of a stage uses its shared heads and as many of the others as are routed. For training, 0.01 times
    `moh_balance_loss` is added to the loss.

    Args:
        num_classes, in_chans, embed_dims, num_heads, mlp_ratios, depths, sr_ratios: as in `TransNeXt`.
        window_size, pretrain_size, pool_size, patch_size, qkv_bias, drop_path_rate, norm_eps: as in `TransNeXt`.
        features_only: give the stages' feature maps, see `Backbone`.
        shared_heads: how many of the heads of each stage are always active.
        routed_heads: how many of the others are active for a token; 0 in a stage whose heads are all shared.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "moh-vit-s-80": _SMALL | {"shared_heads": (3, 6, 3, 8), "drop_path_rate": 0.45},
        "moh-vit-s-75": _SMALL | {"shared_heads": (3, 6, 3, 4), "drop_path_rate": 0.45},
        "moh-vit-b-75": _BASE | {"shared_heads": (4, 8, 4, 5), "routed_heads": (0, 0, 8, 16)},
        "moh-vit-b-50": _BASE | {"shared_heads": (2, 2, 2, 4), "routed_heads": (2, 4, 6, 8)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (5, 5, 22, 5),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int | Sequence[int | None] = 3,
        pretrain_size: int = 224,
        pool_size: int | None = None,
        patch_size: int = 4,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
        shared_heads: Sequence[int] = (3, 6, 3, 8),
        routed_heads: Sequence[int] = (0, 0, 6, 12),
    ):
        check_stages(len(embed_dims), shared_heads=shared_heads, routed_heads=routed_heads)
        super().__init__(
            num_classes,
            in_chans,
            embed_dims,
            num_heads,
            mlp_ratios,
            depths,
            sr_ratios,
            window_size,
            pretrain_size,
            pool_size,
            patch_size,
            qkv_bias,
            drop_path_rate,
            norm_eps,
            features_only,
        )
        for stage, shared, routed in zip(self.stages, shared_heads, routed_heads, strict=True):
            for block in stage.children():
                assert isinstance(block, TransNeXtBlock)
                assert isinstance(block.attn, CosineAttention)
                block.attn = mixture_of_heads(block.attn, shared, routed)
                for name, router in block.attn.named_children():
                    if name.startswith("wg") and isinstance(router, nn.Linear):
                        nn.init.trunc_normal_(router.weight, std=0.02)

    @classmethod
    def from_official(  # type: ignore[override]
        cls,
        state_dict: dict[str, Tensor],
        *,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        num_stages: int = 4,
        shared_head: Sequence[int] = (1, 2, 4, 8),
        routed_head: Sequence[int] = (0, 0, 0, 0),
        **official: Any,
    ) -> "MoHViT":
        """Weights and arguments of the published MoH-ViT, whose class is called ``TransNeXt`` too.

        Its named sizes have ``norm_eps=1e-6``; the other arguments are those of `TransNeXt.from_official`.
        """
        stages = zip(num_heads, shared_head, routed_head, strict=False)
        shared = [some if routed else heads for heads, some, routed in stages][:num_stages]
        further = {"shared_heads": shared, "routed_heads": list(routed_head[:num_stages])}
        model = super().from_official(
            state_dict, num_heads=num_heads, num_stages=num_stages, further=further, **official
        )
        assert isinstance(model, cls)
        return model
