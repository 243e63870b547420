"""DualToken-ViT (arXiv:2309.12424): a small pyramid with a second stream of tokens that stand for places."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.layers.conv_bn import ConvBN
from regard.layers.grid import Conv2d, drop_path_rates
from regard.mechanisms.grid.dual_token import DualTokenBlock
from regard.models.vision.backbone import Backbone, check_stages


class DualTokenMerge(nn.Module):
    """Half the height and width, rounded up: ``W max(x) + V LN([x of the four pixels])``, and ``U LN(G)``."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm, self.token_norm = nn.LayerNorm(4 * dim_in), nn.LayerNorm(dim_in)
        self.reduction = nn.Linear(4 * dim_in, dim_out, bias=False)
        self.shortcut, self.token_proj = (nn.Linear(dim_in, dim_out, bias=False) for _ in range(2))

    def forward(self, x: Tensor, global_tokens: Tensor) -> tuple[Tensor, Tensor]:
        down, right = x.shape[1] % 2, x.shape[2] % 2
        x = F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x
        pixels = torch.stack([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -2)
        x = self.shortcut(pixels.amax(-2)) + self.reduction(self.norm(pixels.flatten(-2)))
        return x, self.token_proj(self.token_norm(global_tokens))


class DualTokenViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A convolutional stem (stride 8), three stages of `DualTokenBlock`, the image halved between them, a norm, and the
    mean over the image. The global tokens are learned, go through all blocks, and are as many at every size.

    No code was published: the blocks are made after the paper's description (see there), stem and merging after
    LightViT, whose they are said to be. Widths and depths are this library's own, chosen so that "dualtoken-vit-t" and
    "dualtoken-vit-s" have the published 0.5 and 1.0 billion multiply-adds. No published weights fit.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dims, depths, num_heads, mlp_ratios: of each stage.
        token_grid: rows and columns of the global tokens.
        mlp: what the global tokens go through, "normal" (along the channels) or "mix" (along the tokens).
        token_mlp_ratio: its width over its input's.
        conv_ratio: width inside the blocks' convolutions over their channels.
        drop_path_rate: of the last block; rises linearly from 0.
        neck_dim: width of a layer (LayerNorm, GELU) before the classifier, None for none.
        block: more arguments of `DualTokenBlock`.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "dualtoken-vit-t": {"depths": (1, 2, 3), "mlp_ratios": (4.0, 4.0, 4.0)},
        "dualtoken-vit-s": {},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 4, 6),
        num_heads: Sequence[int] = (2, 4, 8),
        mlp_ratios: Sequence[float] = (8.0, 4.0, 4.0),
        token_grid: tuple[int, int] = (7, 7),
        mlp: Literal["normal", "mix"] = "normal",
        token_mlp_ratio: float = 1.0,
        conv_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        neck_dim: int | None = None,
        block: dict[str, Any] | None = None,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(embed_dims)
        check_stages(stages, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, neck_dim or embed_dims[-1]
        self.channels, self.strides = tuple(embed_dims), tuple(8 * 2**i for i in range(stages))
        self.features_only = features_only
        half = embed_dims[0] // 2
        layers: list[nn.Module] = [ConvBN(in_chans, half, 3, 2), nn.GELU()]
        for stride in (1, 1, 2):
            layers += [ConvBN(half, half, 3, stride, groups=half), nn.GELU()]
        self.stem = nn.Sequential(*layers, Conv2d(half, embed_dims[0], 3, 2), nn.LayerNorm(embed_dims[0]))
        self.global_tokens = nn.Parameter(torch.empty(1, token_grid[0] * token_grid[1], embed_dims[0]))
        nn.init.trunc_normal_(self.global_tokens, std=0.02)
        self.downsamples = nn.ModuleList(DualTokenMerge(before, after) for before, after in pairwise(embed_dims))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                DualTokenBlock(
                    *(embed_dims[i], num_heads[i], mlp_ratios[i], token_grid, mlp, token_mlp_ratio),
                    conv_ratio=conv_ratio,
                    drop_path=rate,
                    **{"num_downsamples": stages - 1 - i, **(block or {})},
                )
                for rate in rates
            )
            for i, rates in enumerate(drop_path_rates(drop_path_rate, depths))
        )
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.neck: nn.Module = nn.Identity()
        if neck_dim is not None:
            self.neck = nn.Sequential(nn.Linear(embed_dims[-1], neck_dim), nn.LayerNorm(neck_dim), nn.GELU())
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x, features = self.stem(images.movedim(1, -1)), []
        tokens = self.global_tokens.repeat(len(x), 1, 1)
        for i, stage in enumerate(self.stages):
            if i:
                x, tokens = self.downsamples[i - 1](x, tokens)
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x, tokens = block(x, tokens)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.norm(x).mean((1, 2))))
