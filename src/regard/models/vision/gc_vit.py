"""GC ViT (arXiv:2206.09959): local windows, and windows that are asked queries made from the whole image."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, load_strictly
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.layers.scale import LayerScale
from regard.mechanisms.grid.global_context import (
    FUSED_CONV,
    FusedConv,
    GlobalQueryGenerator,
    GlobalWindowAttention,
    LocalWindowAttention,
)
from regard.models.vision.backbone import Backbone, check_stages


class Downsample(nn.Module):
    """``LN(conv3x3(FusedConv(LN x)))`` with stride 2; (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, dim_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv = FusedConv(dim)
        self.reduction = Conv2d(dim, dim_out, 3, 2, bias=False)
        self.norm2 = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.reduction(self.conv(self.norm1(x))))


class GCViTBlock(nn.Module):
    """Window attention, local or with global queries, and an MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        local: bool,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.local = local
        attention = LocalWindowAttention if local else GlobalWindowAttention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention(dim, num_heads, window_size, qkv_bias)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        scales = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.scale1, self.scale2 = scales
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.drop_path(self.scale1(self.attn(normed) if self.local else self.attn(normed, q_global)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class GCViTStage(nn.Module):
    """The queries of the stage from its input, then blocks that are local and global by turns."""

    def __init__(self, dim: int, depth: int, num_heads: int, window_size: int, poolings: int, **options: Any):
        super().__init__()
        rates = options.pop("drop_path")
        self.queries = GlobalQueryGenerator(dim, num_heads, window_size, poolings)
        self.blocks = nn.ModuleList(
            GCViTBlock(dim, num_heads, window_size, i % 2 == 0, drop_path=rates[i], **options) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        q_global = self.queries(x)
        for block in self.blocks:
            x = block(x, q_global)
        return x


class GCViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), of the one size that suits the windows.

    A stem (stride 4) and four stages with convolutions of stride 2 between them. In a stage local window attention
    takes turns with window attention whose queries come from the whole image. At stride s the image must be pooled to
    exactly one window, so other resolutions need other windows: 224 has 7, 7, 14, 7; 384 has 12, 12, 24, 12.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dim: of the first stage; doubles from stage to stage.
        depths, num_heads, window_size: of each stage.
        resolution: H and W, from which follows how often the queries of each stage are pooled.
        mlp_ratio: width of the MLPs.
        qkv_bias: whether queries, keys and values have biases.
        layer_scale: initial scale of the branches, None for none.
        drop_path_rate: of the last block; rises linearly from 0.
        query_poolings: of each stage, instead of what follows from the resolution.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "gc-vit-xxtiny": {"depths": (2, 2, 6, 2)},
        "gc-vit-xtiny": {"depths": (3, 4, 6, 5)},
        "gc-vit-tiny": {"depths": (3, 4, 19, 5)},
        "gc-vit-tiny2": {"depths": (3, 4, 29, 5), "drop_path_rate": 0.25},
        "gc-vit-small": {
            "dim": 96,
            "depths": (3, 4, 19, 5),
            "num_heads": (3, 6, 12, 24),
            "mlp_ratio": 2.0,
            "layer_scale": 1e-5,
            "drop_path_rate": 0.3,
        },
        "gc-vit-small2": {
            "dim": 96,
            "depths": (3, 4, 23, 5),
            "num_heads": (3, 6, 12, 24),
            "layer_scale": 1e-5,
            "drop_path_rate": 0.35,
        },
        "gc-vit-base": {
            "dim": 128,
            "depths": (3, 4, 19, 5),
            "num_heads": (4, 8, 16, 32),
            "mlp_ratio": 2.0,
            "layer_scale": 1e-5,
            "drop_path_rate": 0.5,
        },
        "gc-vit-large": {
            "dim": 192,
            "depths": (3, 4, 19, 5),
            "num_heads": (6, 12, 24, 48),
            "mlp_ratio": 2.0,
            "layer_scale": 1e-5,
            "drop_path_rate": 0.5,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: Sequence[int] = (7, 7, 14, 7),
        resolution: int = 224,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.2,
        query_poolings: Sequence[int] | None = None,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(depths)
        if query_poolings is None:
            query_poolings = [_poolings(resolution, 4 * 2**i, window) for i, window in enumerate(window_size)]
        check_stages(stages, num_heads=num_heads, window_size=window_size, query_poolings=query_poolings)
        dims = [dim * 2**i for i in range(stages)]
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        self.stem = nn.Sequential(Conv2d(in_chans, dim, 3, 2), Downsample(dim, dim))
        rates = drop_path_rates(drop_path_rate, depths)
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "layer_scale": layer_scale}
        self.stages = nn.ModuleList(
            GCViTStage(dims[i], depths[i], num_heads[i], window_size[i], poolings, drop_path=rates[i], **options)
            for i, poolings in enumerate(query_poolings)
        )
        self.downsamples = nn.ModuleList(Downsample(width, 2 * width) for width in dims[:-1])
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))

    def prepare(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        for stride, stage in zip(self.strides, self.stages, strict=True):
            assert isinstance(stage, GCViTStage)
            h, w = -(-height // stride), -(-width // stride)
            size = stage.queries.window_size
            try:
                stage.queries.check_size(h, w)
            except ShapeError as error:
                raise ShapeError(f"images: {height} x {width} does not suit the windows; {error}") from None
            if h % size or w % size:
                raise ShapeError(f"images: {height} x {width} is {h} x {w} at stride {stride}, no multiple of {size}")
        return x

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        depths: Sequence[int],
        window_size: Sequence[int],
        mlp_ratio: float,
        num_heads: Sequence[int],
        resolution: int = 224,
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
    ) -> "GCViT":
        """Weights and arguments of the published ``GCViT``."""
        model = cls(
            num_classes,
            in_chans,
            dim,
            depths,
            num_heads,
            window_size,
            resolution,
            mlp_ratio,
            qkv_bias,
            layer_scale,
            drop_path_rate,
            (3, 2, 0, 0)[: len(depths)],
        )
        state = {name: t for name, t in state_dict.items() if not name.endswith("relative_position_index")}
        rename = {"patch_embed.proj": "stem.0", "patch_embed.conv_down": "stem.1"}
        rename |= {f"patch_embed.conv_down.{a}": f"stem.1.conv.{b}" for a, b in FUSED_CONV.items()}
        for i, depth in enumerate(depths):
            rename |= {f"levels.{i}.downsample": f"downsamples.{i}"}
            rename |= {f"levels.{i}.downsample.{a}": f"downsamples.{i}.conv.{b}" for a, b in FUSED_CONV.items()}
            for j, conv in ((j, f"levels.{i}.q_global_gen.to_q_global.{j}") for j in range(3)):
                rename |= {f"{conv}.{a}": f"stages.{i}.queries.convs.{j}.{b}" for a, b in FUSED_CONV.items()}
            for old, new in ((f"levels.{i}.blocks.{j}", f"stages.{i}.blocks.{j}") for j in range(depth)):
                rename |= {old: new, f"{old}.attn.relative_position_bias_table": f"{new}.attn.rel_pos.table"}
                rename |= {f"{old}.gamma{n}": f"{new}.scale{n}.gamma" for n in "12"}
        load_strictly(model, state, rename)
        return model


def _poolings(resolution: int, stride: int, window_size: int) -> int:
    """How often the grid at this stride is halved until it is one window."""
    side, poolings = -(-resolution // stride), 0
    while side > window_size:
        side, poolings = -(-side // 2), poolings + 1
    if side != window_size:
        raise ArgumentError(
            f"window_size: {window_size} at stride {stride} is not {resolution} // {stride} halved some times"
        )
    return poolings
