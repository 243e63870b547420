"""TransNeXt (arXiv:2311.17132): aggregated attention in three stages, global attention in the last."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.layers.conv_glu import ConvGLU
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.aggregated import AggregatedAttention, CosineAttention
from regard.models.vision.backbone import Backbone


class TransNeXtBlock(nn.Module):
    """``x += attention(LN x); x += ConvGLU(LN x)`` on (B, H, W, C)."""

    def __init__(self, dim: int, attn: nn.Module, hidden_dim: int, drop_path: float, norm_eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.attn, self.mlp, self.drop_path = attn, ConvGLU(dim, hidden_dim), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


_TINY: dict[str, Any] = {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24)}
_MICRO: dict[str, Any] = {"embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16)}


class TransNeXt(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size whose stages can be pooled by their ratio.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dims, num_heads, mlp_ratios, depths: of each stage; a ConvGLU has two thirds of its MLP's width.
        sr_ratios: pooling of each stage; 1 for global attention in place of aggregated attention.
        window_size: side of the neighbourhood, for all stages or each.
        pretrain_size: side of the images in whose units positions are measured.
        pool_size: side of the pooled grid whatever the image, in place of sr_ratios above 1.
        patch_size: stride of the first embedding, whose kernel is 2 · patch_size - 1 wide.
        qkv_bias: of the attentions.
        drop_path_rate: of the last block; rises linearly from 0.
        norm_eps: of the norms of blocks and stages.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "transnext-micro": _MICRO,
        "transnext-micro-aaaa": _MICRO | {"sr_ratios": (16, 8, 4, 2)},
        "transnext-tiny": _TINY,
        "transnext-small": _TINY | {"depths": (5, 5, 22, 5)},
        "transnext-base": {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 15, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int | Sequence[int | None] = 3,
        pretrain_size: int = 224,
        pool_size: int | None = None,
        patch_size: int = 4,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(embed_dims)
        windows = [window_size] * stages if isinstance(window_size, int) else list(window_size)
        for name, given in (
            ("num_heads", num_heads),
            ("mlp_ratios", mlp_ratios),
            ("depths", depths),
            ("sr_ratios", sr_ratios),
            ("window_size", windows),
        ):
            if len(given) != stages:
                raise ArgumentError(f"{name}: expected one for each of {stages} stages, got {len(given)}")
        if pretrain_size // (4 * 2 ** (stages - 1)) < 2:
            raise ArgumentError(
                f"pretrain_size: expected 2 or more tokens a side in stage {stages}, got {pretrain_size}"
            )
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dims[-1]
        self.channels, self.strides = tuple(embed_dims), tuple(patch_size * 2**i for i in range(stages))
        self.features_only = features_only
        self.sr_ratios, self.pool_size = tuple(sr_ratios), pool_size
        self.embeds, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depths)
        for i, dim in enumerate(embed_dims):
            kernel, stride = (2 * patch_size - 1, patch_size) if i == 0 else (3, 2)
            before = in_chans if i == 0 else embed_dims[i - 1]
            self.embeds.append(nn.Sequential(Conv2d(before, dim, kernel, stride), nn.LayerNorm(dim)))
            blocks = []
            for rate in rates[i]:
                attn: nn.Module
                grid, window = pretrain_size // (4 * 2**i), windows[i]
                if sr_ratios[i] == 1:
                    attn = CosineAttention(dim, num_heads[i], grid, qkv_bias)
                elif window is None:
                    raise ArgumentError(
                        f"window_size: expected one for stage {i} with sr_ratio {sr_ratios[i]}, got None"
                    )
                else:
                    attn = AggregatedAttention(dim, num_heads[i], grid, window, sr_ratios[i], pool_size, qkv_bias)
                blocks.append(TransNeXtBlock(dim, attn, int(dim * mlp_ratios[i]), rate, norm_eps))
            self.stages.append(nn.Sequential(*blocks))
            self.norms.append(nn.LayerNorm(dim, norm_eps))
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self._check_size(*images.shape[2:])
        x, features = images.movedim(1, -1), []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            x = norm(stage(embed(x)))
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((1, 2)))

    def _check_size(self, height: int, width: int) -> None:
        for i, (stride, ratio) in enumerate(zip(self.strides, self.sr_ratios, strict=True)):
            least = 1 if ratio == 1 else ratio if self.pool_size is None else self.pool_size + 1
            if -(-min(height, width) // stride) < least:
                raise ShapeError(f"images: expected {least} or more tokens a side in stage {i}, got {height} x {width}")

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        img_size: int = 224,
        pretrain_size: int | None = None,
        window_size: Sequence[int | None] = (3, 3, 3, None),
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        num_stages: int = 4,
        fixed_pool_size: int | None = None,
        norm_eps: float = 1e-5,
        further: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> "TransNeXt":
        """Weights and arguments of the published ``TransNeXt``; its named sizes have ``norm_eps=1e-6``.

        ``further`` are arguments that a subclass has besides.
        """
        model = cls(
            num_classes,
            in_chans,
            embed_dims[:num_stages],
            num_heads[:num_stages],
            mlp_ratios[:num_stages],
            depths[:num_stages],
            sr_ratios[:num_stages],
            window_size[:num_stages],
            pretrain_size or img_size,
            fixed_pool_size,
            patch_size,
            qkv_bias,
            drop_path_rate,
            norm_eps,
            **(further or {}),
        )
        rename: dict[str, str] = {}
        for i in range(num_stages):
            rename |= {f"patch_embed{i + 1}.proj": f"embeds.{i}.0", f"patch_embed{i + 1}.norm": f"embeds.{i}.1"}
            rename |= {f"norm{i + 1}": f"norms.{i}"}
            for j in range(depths[i]):
                old, new = f"block{i + 1}.{j}", f"stages.{i}.{j}"
                rename |= {old: new, f"{old}.mlp.dwconv.dwconv": f"{new}.mlp.dwconv"}
                rename |= {f"{old}.attn.cpb_fc{n}": f"{new}.attn.cpb.{2 * n - 2}" for n in (1, 2)}
        load_strictly(model, state_dict, rename)
        return model
