"""The two networks that all others are compared with: patches, and one kind of block in a row."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP
from regard.layers.grid import Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.softmax import SoftmaxAttention
from regard.models.vision.backbone import Backbone

Mixer = Literal["attention", "conv"]


class PlainBlock(nn.Module):
    """``x + mixer(norm x)``, then ``x + MLP(norm x)``; (B, H, W, C) to the same."""

    def __init__(self, dim: int, mixer: Mixer, num_heads: int, kernel_size: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixer = (
            SoftmaxAttention(dim, num_heads, bias=True, causal=False)
            if mixer == "attention"
            else DepthwiseConv2d(dim, kernel_size)
        )
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if isinstance(self.mixer, SoftmaxAttention):
            y = self.mixer(y.flatten(1, 2)).unflatten(1, x.shape[1:3])
        else:
            y = self.mixer(y)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Plain(Backbone):
    """With ``mixer="attention"`` a vision transformer (arXiv:2010.11929), with ``"conv"`` the same with 7×7 filters.

        x = W patches [+ positions],    x = x + mixer(norm x),  x = x + MLP(norm x),  …,    logits = W mean(norm x)

    The transformer has a learnt position per patch, resized for images of other sizes than ``img_size``; its output is
    the mean of the patches, without a class token. Images must be multiples of the patch. Cost O(N² C) or O(N k² C).

    Args:
        img_size: of the learnt positions. patch_size: side of a patch, and the only stage's stride.
        dim: C. depth: number of blocks. mixer: "attention" or "conv".
        num_heads: of attention. kernel_size: k, of the filters.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "vit-tiny": {"dim": 192, "num_heads": 3},
        "vit-small": {"dim": 384, "num_heads": 6},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 12,
        mixer: Mixer = "attention",
        num_heads: int = 3,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        if mixer not in ("attention", "conv"):
            raise ArgumentError(f"mixer: expected 'attention' or 'conv', got {mixer!r}")
        if patch_size < 1 or img_size < patch_size:
            raise ArgumentError(f"patch_size: expected 1 to img_size={img_size}, got {patch_size}")
        super().__init__()
        self.num_classes, self.in_chans, self.features_only = num_classes, in_chans, features_only
        self.num_features, self.channels, self.strides = dim, (dim,), (patch_size,)
        self.patch_size = patch_size
        self.stem = Conv2d(in_chans, dim, patch_size, patch_size, padding=0)
        side = img_size // patch_size
        self.position = nn.Parameter(0.02 * torch.randn(1, dim, side, side)) if mixer == "attention" else None
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        blocks = (PlainBlock(dim, mixer, num_heads, kernel_size, mlp_ratio, rate) for rate in rates)
        self.stages = nn.ModuleList([nn.Sequential(*blocks)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def prepare(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ShapeError(
                f"images: expected multiples of the patch of {self.patch_size}, got {x.shape[1]} x {x.shape[2]}"
            )
        return x

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x = self.stem(self.prepare(images.movedim(1, -1)))
        if self.position is not None:
            position: Tensor = self.position
            if position.shape[2:] != x.shape[1:3]:
                position = F.interpolate(position, x.shape[1:3], mode="bicubic", align_corners=False)
            x = x + position.movedim(1, -1)
        return [self.stages[0](x)]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))
