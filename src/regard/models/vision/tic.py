"""TiC (arXiv:2310.04134): a network of MSA-Conv layers. Only the layer is published; the rest is our reading."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers import MLP
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.msa_conv import MSAConv2d
from regard.models.vision.backbone import Backbone, check_stages


def cyclic_shift(x: Tensor, shift: int, back: bool = False) -> Tensor:
    """A quarter of the channels of (B, H, W, C) is rolled by ``shift`` pixels in each of the four directions."""
    if shift == 0:
        return x
    step = -shift if back else shift
    turns = ((step, 1), (-step, 1), (step, 2), (-step, 2))
    return torch.cat([part.roll(by, axis) for part, (by, axis) in zip(x.tensor_split(4, -1), turns, strict=True)], -1)


def inter_pool(x: Tensor, stride: int) -> Tensor:
    """The mean of 2×2 pixels, (B, H, W, C) to (B, ⌈H / stride⌉, ⌈W / stride⌉, C); the last ones are of fewer pixels."""
    if stride == 1:
        x = F.pad(x.movedim(-1, 1), (0, 1, 0, 1), mode="replicate")
        return F.avg_pool2d(x, 2, 1).movedim(1, -1)
    return F.avg_pool2d(x.movedim(-1, 1), 2, 2, ceil_mode=True, count_include_pad=False).movedim(1, -1)


class TicBlock(nn.Module):
    """``x += back(MSAConv(shifted(LN x))); x += MLP(LN x)``; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int, num_heads: int, shift: int, attn_drop: float, drop_path: float):
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.msa = MSAConv2d(dim, dim, kernel_size, num_heads=num_heads, attn_drop=attn_drop)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        h = self.msa(cyclic_shift(self.norm1(x), self.shift))
        x = x + self.drop_path(cyclic_shift(h, self.shift, back=True))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TiC(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A 4×4 convolution of stride 4, stages of `TicBlock` with an MSA-Conv of stride 2 between them, and the mean over
    the image. The paper's network is not published: the multi-directional cyclic shift (every other block) and the
    pooling between blocks, which doubles what the next window covers, are read from their names.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths: of each stage.
        kernel_size: of the MSA-Convs, odd.
        num_heads: heads of each stage, or one number for all.
        shift: pixels of the cyclic shift, 0 for none.
        inter_pooling: average 2×2 pixels between the blocks of a stage, and between stages, where it takes the place
            of the stride.
        attn_drop: of the MSA-Convs.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        kernel_size: int = 3,
        num_heads: int | Sequence[int] = 1,
        shift: int = 1,
        inter_pooling: bool = True,
        attn_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        heads = [num_heads] * len(dims) if isinstance(num_heads, int) else list(num_heads)
        check_stages(len(dims), depths=depths, num_heads=heads)
        if shift < 0:
            raise ArgumentError(f"shift: expected at least 0, got {shift}")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(len(dims)))
        self.inter_pooling, self.features_only = inter_pooling, features_only
        self.stem = nn.Sequential(Conv2d(in_chans, dims[0], 4, 4, padding=0), nn.LayerNorm(dims[0]))
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                TicBlock(dims[i], kernel_size, heads[i], shift * (j % 2), attn_drop, rate)
                for j, rate in enumerate(rates[i])
            )
            for i in range(len(dims))
        )
        step = 1 if inter_pooling else 2
        self.downsamples = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(before),
                MSAConv2d(before, after, kernel_size, step, num_heads=heads[i], attn_drop=attn_drop),
            )
            for i, (before, after) in enumerate(pairwise(dims))
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        down, right = -images.shape[2] % 4, -images.shape[3] % 4
        x = self.stem(F.pad(images.movedim(1, -1), (0, 0, 0, right, 0, down)))
        features = []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downsamples[i - 1](inter_pool(x, 2) if self.inter_pooling else x)
            assert isinstance(stage, nn.ModuleList)
            for j, block in enumerate(stage):
                x = block(inter_pool(x, 1) if self.inter_pooling and j else x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))
