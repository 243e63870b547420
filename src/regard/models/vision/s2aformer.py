"""S2AFormer (arXiv:2505.22195): strip attention between convolutions, in four stages."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.layers import MLP
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.strip import Reduction, StripAttention
from regard.models.vision.backbone import Backbone, check_stages


class LocalInteraction(nn.Sequential):
    """``GELU(BN(dwconv(x))) W``: what coarse keys miss; (B, H, W, C) to the same."""

    def __init__(self, dim: int):
        super().__init__(DepthwiseConv2d(dim), BatchNorm2d(dim), nn.GELU(), nn.Linear(dim, dim))


class HybridPerceptionBlock(nn.Module):
    """A convolution, `StripAttention`, `LocalInteraction` and an MLP, all residual; the last three after a norm."""

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, **attn: Any
    ):
        super().__init__()
        self.conv = DepthwiseConv2d(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = StripAttention(dim, num_heads, sr_ratio, **attn)
        self.local = LocalInteraction(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local(self.norm2(x)))
        return x + self.drop_path(self.mlp(self.norm3(x)))


class S2AFormer(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes); H and W multiples of 32 unless ``pad``.

    A stem of three convolutions (stride 2), four stages of `HybridPerceptionBlock`, each behind a convolution of stride
    2 and a norm, and the mean over the image. The paper gives the order of a block; the layers inside the stem and the
    local interaction and all sizes are reconstructions, as no code is published.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths, num_heads, sr_ratios: of each stage.
        mlp_ratio: width of the MLPs.
        qk_dim, qkv_bias, reduction, temperature, pad: see `StripAttention`.
        stem_dim: channels of the stem, half of the first stage's by default.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "s2aformer-mini": {"dims": (24, 48, 96, 192), "depths": (2, 2, 4, 2)},
        "s2aformer-t": {"dims": (32, 64, 128, 256), "depths": (2, 2, 6, 2)},
        "s2aformer-xs": {"dims": (40, 80, 160, 320), "depths": (3, 3, 6, 3)},
        "s2aformer-s": {"dims": (48, 96, 192, 384), "depths": (3, 3, 9, 3)},
        "s2aformer-m": {"dims": (64, 128, 256, 512), "depths": (3, 3, 12, 3)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        qk_dim: int = 1,
        qkv_bias: bool = True,
        reduction: Reduction = "conv",
        temperature: bool = False,
        pad: bool = False,
        stem_dim: int | None = None,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)
        check_stages(stages, depths=depths, num_heads=num_heads, sr_ratios=sr_ratios)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        width = dims[0] // 2 if stem_dim is None else stem_dim
        stem: list[nn.Module] = []
        for before, stride in ((in_chans, 2), (width, 1), (width, 1)):
            stem += [Conv2d(before, width, 3, stride), BatchNorm2d(width), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        rates = drop_path_rates(drop_path_rate, depths)
        attn = {"qk_dim": qk_dim, "qkv_bias": qkv_bias, "reduction": reduction, "temperature": temperature, "pad": pad}
        self.embeddings, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            before = dims[i - 1] if i else width
            self.embeddings.append(nn.Sequential(Conv2d(before, dim, 3, 2), nn.LayerNorm(dim)))
            blocks = (
                HybridPerceptionBlock(dim, num_heads[i], sr_ratios[i], mlp_ratio, rate, **attn) for rate in rates[i]
            )
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images.movedim(1, -1))
        features = []
        for embedding, stage in zip(self.embeddings, self.stages, strict=True):
            x = stage(embedding(x))
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))
