"""The pyramid that MALA and PPMA share: convolutions, blocks of attention and convolutional MLP, a wide projection."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from regard.layers.conv_mlp import ConvMLP
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.layers.scale import LayerScale
from regard.models.vision.backbone import Backbone


class PyramidBlock(nn.Module):
    """``x += dwconv(x); x += γ₁ attention(LN x); x += γ₂ ConvMLP(LN x)`` on (B, H, W, C); γ only with layer_scale."""

    def __init__(
        self,
        dim: int,
        attention: Callable[[], nn.Module],
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        self.pos = DepthwiseConv2d(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention()
        self.ffn = ConvMLP(dim, int(dim * mlp_ratio))
        scales = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.scale1, self.scale2 = scales
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x))))


class Pyramid(Backbone):
    """A convolutional stem (stride 4), stages with convolutions of stride 2 between them, a projection with Swish.

    Args:
        num_classes, in_chans, features_only: see `Backbone`.
        dims, depths, mlp_ratios, layer_scale: of each stage.
        attentions: make the attention of a block of each stage.
        stem: output channels and stride of each of its convolutions.
        projection: channels before the pooling.
        drop_path_rate: of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        dims: Sequence[int],
        depths: Sequence[int],
        attentions: Sequence[Callable[[], nn.Module]],
        mlp_ratios: Sequence[float],
        stem: Sequence[tuple[int, int]],
        projection: int,
        drop_path_rate: float,
        layer_scale: Sequence[float | None],
        features_only: bool,
    ):
        super().__init__()
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, projection
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(len(dims)))
        self.features_only = features_only
        layers: list[nn.Module] = []
        for (before, _), (after, stride) in pairwise([(in_chans, 1), *stem]):
            layers += [Conv2d(before, after, 3, stride), BatchNorm2d(after), nn.GELU()]
        self.stem = nn.Sequential(*layers[:-1])
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(PyramidBlock(dim, attentions[i], mlp_ratios[i], rate, layer_scale[i]) for rate in rates[i]))
            for i, dim in enumerate(dims)
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
