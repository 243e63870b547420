"""FaViT (arXiv:2312.08614): factorization self-attention in a pyramid of convolutions."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ShapeError
from regard.layers import load_strictly
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.factorization import PUBLISHED, FactorizationAttention
from regard.models.vision.backbone import Backbone, check_stages
from regard.models.vision.spectformer_h import ConvMLP


class FaViTBlock(nn.Module):
    """``x += FaSA(LN x); x += W2 GELU(dwconv(W1 LN x))`` on (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        window_pool: str = "channels",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.attn = FactorizationAttention(dim, num_heads, sr_ratio, window_size, qkv_bias, window_pool)
        self.mlp = ConvMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FaViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size that the windows can be filled up to.

    Overlapping convolutions (7×7 with stride 4, then 3×3 with stride 2) before each of four stages, LN after each.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dims, num_heads, mlp_ratios, depths: of each stage.
        sr_ratios: r of `FactorizationAttention` in each stage.
        window_size: L.
        qkv_bias: of attention's projections except the last.
        window_pool: "channels" as published, or "windows" as described.
        norm_eps: of the blocks' and stages' layer norms.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "favit-b0": {"embed_dims": (32, 64, 128, 256), "depths": (2, 2, 6, 2)},
        "favit-b1": {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2)},
        "favit-b2": {"embed_dims": (64, 128, 256, 512), "depths": (2, 3, 18, 3)},
        "favit-b3": {"embed_dims": (96, 192, 384, 768), "depths": (2, 3, 14, 3)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        depths: Sequence[int] = (2, 2, 6, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 7,
        qkv_bias: bool = True,
        window_pool: str = "channels",
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.1,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(embed_dims)
        check_stages(stages, num_heads=num_heads, mlp_ratios=mlp_ratios, depths=depths, sr_ratios=sr_ratios)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dims[-1]
        self.channels, self.strides = tuple(embed_dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        convs = [Conv2d(in_chans, embed_dims[0], 7, 4), *(Conv2d(*dims, 3, 2) for dims in pairwise(embed_dims))]
        self.downsamples = nn.ModuleList(
            nn.Sequential(conv, nn.LayerNorm(dim, 1e-5)) for conv, dim in zip(convs, embed_dims, strict=True)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        shared = (qkv_bias, window_pool, norm_eps)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    FaViTBlock(dim, num_heads[i], sr_ratios[i], window_size, mlp_ratios[i], *shared, rate)
                    for rate in rates[i]
                )
            )
            for i, dim in enumerate(embed_dims)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, norm_eps) for dim in embed_dims)
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self._check_size(*images.shape[2:])
        x = images.movedim(1, -1)
        features = []
        for downsample, stage, norm in zip(self.downsamples, self.stages, self.norms, strict=True):
            x = norm(stage(downsample(x)))
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((1, 2)))

    def _check_size(self, height: int, width: int) -> None:
        for stride, stage in zip(self.strides, self.stages, strict=True):
            for block in stage.children():
                assert isinstance(block, FaViTBlock)
                try:
                    block.attn.check_size(-(-height // stride), -(-width // stride))
                except ShapeError as error:
                    raise ShapeError(f"images: {height} x {width} is too small at stride {stride}; {error}") from None

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 5, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        norm_eps: float = 1e-5,
        **_: Any,
    ) -> "FaViT":
        """Weights and arguments of the published ``FactorizationTransformer``; ``norm_eps`` is its norm layer's."""
        model = cls(
            num_classes,
            in_chans,
            embed_dims,
            num_heads,
            mlp_ratios,
            depths,
            sr_ratios,
            qkv_bias=qkv_bias,
            norm_eps=norm_eps,
            drop_path_rate=drop_path_rate,
        )
        rename: dict[str, str] = {}
        for i, depth in enumerate(depths):
            rename |= {f"patch_embed{i + 1}.proj": f"downsamples.{i}.0", f"norm{i + 1}": f"norms.{i}"}
            rename |= {f"patch_embed{i + 1}.norm": f"downsamples.{i}.1"}
            for old, new in ((f"block{i + 1}.{j}", f"stages.{i}.{j}") for j in range(depth)):
                rename |= {old: new, f"{old}.mlp.dwconv.dwconv": f"{new}.mlp.dwconv"}
                rename |= {f"{old}.attn.{a}": f"{new}.attn.{b}" for a, b in PUBLISHED.items()}
        load_strictly(model, state_dict, rename)
        return model
