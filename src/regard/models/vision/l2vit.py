"""L2ViT (arXiv:2501.16182): window softmax attention and linear global attention by turns."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.window import WindowAttention2d
from regard.mechanisms.linear.relu_linear import ReLULinearAttention
from regard.models.vision.backbone import Backbone, check_stages


class LocalConcentration(nn.Module):
    """Two large depthwise convolutions, which gather what linear attention spread; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int = 7):
        super().__init__()
        self.conv1 = DepthwiseConv2d(dim, kernel_size)
        self.bn = BatchNorm2d(dim)
        self.conv2 = DepthwiseConv2d(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(F.gelu(self.conv1(x))))


class WindowBlock(nn.Module):
    """Window attention and an MLP, a convolution for positions before each."""

    def __init__(self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe = nn.ModuleList(DepthwiseConv2d(dim) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention2d(dim, num_heads, window_size)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(nn.Module):
    """Linear attention, local concentration and an MLP, after a convolution for positions."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe = DepthwiseConv2d(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = ReLULinearAttention(dim, num_heads)
        self.local = LocalConcentration(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe(x)
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2)).view_as(x))
        x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Downsample(nn.Module):
    """Half the height and width, rounded up: a 2×2 convolution of the normalised image, filled up with zeros."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim_in)
        self.proj = Conv2d(dim_in, dim_out, 2, 2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_filled(self.norm(x), 2))


class L2ViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A convolutional stem (stride 4), four stages that alternate `WindowBlock` and `GlobalBlock`, 2×2 convolutions of
    stride 2 between them, and the mean over the image.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths, num_heads: of each stage.
        window_size: of the window attention.
        mlp_ratio: width of the MLPs, one for all or one per stage.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "l2vit-tiny": {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
        "l2vit-small": {"dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
        "l2vit-base": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
        "l2vit-base-384": {
            "dims": (128, 256, 512, 1024),
            "depths": (2, 2, 18, 2),
            "num_heads": (4, 8, 16, 32),
            "window_size": 12,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float | Sequence[float] = 4.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, int | float) else list(mlp_ratio)
        check_stages(stages, depths=depths, num_heads=num_heads, mlp_ratio=ratios)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        half = dims[0] // 2
        self.stem = nn.Sequential(
            *(Conv2d(in_chans, half, 3, 2), BatchNorm2d(half), nn.ReLU()),
            *(Conv2d(half, dims[0], 3, 2), BatchNorm2d(dims[0]), nn.LayerNorm(dims[0])),
        )
        self.downsamples = nn.ModuleList(Downsample(before, after) for before, after in pairwise(dims))
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    GlobalBlock(dims[i], num_heads[i], ratios[i], rate)
                    if block % 2
                    else WindowBlock(dims[i], num_heads[i], window_size, ratios[i], rate)
                    for block, rate in enumerate(rates[i])
                )
            )
            for i in range(stages)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def prepare(self, x: Tensor) -> Tensor:
        return _filled(x, 4)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float | Sequence[float] = (4, 4, 4, 4),
        block_type: str = "mix_local_enhanced_vit",
        conv_stem: bool = True,
        norm: Mapping[str, str] | None = None,
        drop_path_rate: float = 0.0,
        **_: Any,
    ) -> "L2ViT":
        """Weights and arguments of the published ``L2ViT``.

        Raises:
            Unsupported: other blocks, stems or norms than those of the published models.
        """
        for name, value, known in (
            ("block_type", block_type, "mix_local_enhanced_vit"),
            ("conv_stem", conv_stem, True),
            ("norm", (norm or {}).get("type", "LN"), "LN"),
        ):
            if value != known:
                raise Unsupported(f"{name}: only {known!r}, as in the published models, got {value!r}")
        model = cls(num_classes, in_chans, dims, depths, num_heads, window_size, mlp_ratio, drop_path_rate)
        rename = {"downsample_layers.0.proj.proj": "stem", "downsample_layers.0.norm": "stem.5"}
        for i in range(1, len(dims)):
            rename |= {f"downsample_layers.{i}": f"downsamples.{i - 1}"}
        for i, depth in enumerate(depths):
            for j in range(depth):
                block = f"stages.{i}.{j}"
                if j % 2:
                    rename |= {f"{block}.cpe.0.proj": f"{block}.cpe", f"{block}.local_mp": f"{block}.local"}
                else:
                    rename |= {f"{block}.cpe.{n}.proj": f"{block}.cpe.{n}" for n in range(2)}
        load_strictly(model, state_dict, rename)
        return model


def _filled(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and right up to a multiple of both sides."""
    down, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x
