"""SpectFormer (arXiv:2304.06446): frequencies are gated in the first blocks, tokens attend in the others."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly, split_rows
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.spectral import SpectralGating
from regard.mechanisms.softmax import SoftmaxAttention
from regard.models.vision.backbone import Backbone


class SpectralBlock(nn.Module):
    """``x + MLP(norm(gating(norm(x))))``: one residual around both, as in GFNet."""

    def __init__(self, dim: int, grid_size: Sequence[int], mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixer = SpectralGating(dim, grid_size)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.mixer(self.norm1(x)))))


class AttentionBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + MLP(norm(x))``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixer = SoftmaxAttention(dim, num_heads, bias=True, causal=False)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x).flatten(1, 2)).view_as(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SpectFormer(Backbone):
    """Images (B, in_chans, *img_size) to logits (B, num_classes); `SpectFormerH` is the one with four stages.

    Patches with learned positions, ``alpha`` blocks of spectral gating, blocks of attention, and the mean over the
    image. Filters and positions are made for one size of image, `resize` makes them for another.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        img_size: height and width, or one number for both.
        patch_size: sides of the patches.
        dim, depth: of the blocks.
        alpha: how many of them gate frequencies, the first ones.
        num_heads: of the attention.
        mlp_ratio: width of the MLPs.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the last block's feature map, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "spectformer-t": {"dim": 256, "depth": 12, "num_heads": 4},
        "spectformer-xs": {"dim": 384, "depth": 12, "num_heads": 6},
        "spectformer-s": {"dim": 384, "depth": 19, "num_heads": 6, "drop_path_rate": 0.15},
        "spectformer-b": {"dim": 512, "depth": 19, "num_heads": 8, "drop_path_rate": 0.25},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        alpha: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        if not 0 <= alpha <= depth:
            raise ArgumentError(f"alpha: expected 0 to {depth} (depth), got {alpha}")
        self.img_size = image_shape(img_size)
        grid = tuple(side // patch_size for side in self.img_size)
        if min(grid) < 1:
            raise ArgumentError(
                f"patch_size: expected at most the sides of the image {self.img_size}, got {patch_size}"
            )
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dim
        self.channels, self.strides, self.features_only = (dim,), (patch_size,), features_only
        self.patch_embed = Conv2d(in_chans, dim, patch_size, patch_size, padding=0)
        self.positions = nn.Parameter(torch.zeros(1, *grid, dim))
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.Sequential(
            *(
                SpectralBlock(dim, grid, mlp_ratio, rate)
                if i < alpha
                else AttentionBlock(dim, num_heads, mlp_ratio, rate)
                for i, rate in enumerate(rates)
            )
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.positions, std=0.02)
        small_linear_weights(self)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        check_image(images, self.img_size)
        return [self.blocks(self.patch_embed(images.movedim(1, -1)) + self.positions)]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))

    @torch.no_grad()
    def resize(self, img_size: int | Sequence[int]) -> Self:
        """Make it for images of another size, in place: positions and filters are interpolated bilinearly."""
        self.img_size = image_shape(img_size)
        grid = tuple(side // self.strides[0] for side in self.img_size)
        positions = F.interpolate(self.positions.movedim(-1, 1), grid, mode="bilinear")
        self.positions = nn.Parameter(positions.movedim(1, -1).contiguous())
        for block in self.blocks:
            if isinstance(block, SpectralBlock):
                block.mixer.resize(grid)
        if isinstance(self._hub_mixin_config, dict):  # what a saved model is made from
            self._hub_mixin_config["img_size"] = self.img_size
        return self

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        num_heads: int = 6,
        **others: Any,
    ) -> "SpectFormer":
        """Weights and arguments of the published ``SpectFormer`` of one stage, which has always six heads.

        Raises:
            Unsupported: dropout, equal rates of stochastic depth, or a representation layer, which that code never
                applies.
        """
        if used := [name for name, value in others.items() if value]:
            raise Unsupported(f"{', '.join(used)}: not supported, published models leave them at their defaults")
        alpha = sum(name.endswith(".complex_weight") for name in state_dict)
        model = cls(
            num_classes, in_chans, img_size, patch_size, embed_dim, depth, alpha, num_heads, mlp_ratio, drop_path_rate
        )
        rename = {"patch_embed.proj": "patch_embed", "pos_embed": "positions"}
        state = dict(state_dict)
        state["pos_embed"] = state["pos_embed"].view_as(model.positions)
        for i in range(depth):
            rename |= {f"blocks.{i}.filter.complex_weight": f"blocks.{i}.mixer.weight"}
            rename |= {f"blocks.{i}.attn": f"blocks.{i}.mixer", f"blocks.{i}.attn.proj": f"blocks.{i}.mixer.o_proj"}
            split_rows(state, f"blocks.{i}.attn.qkv", tuple(f"blocks.{i}.attn.{which}_proj" for which in "qkv"))
        load_strictly(model, state, rename)
        return model


def image_shape(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or both."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < 1:
        raise ArgumentError(f"img_size: expected sides of at least 1, got {img_size}")
    return height, width


def check_image(images: Tensor, img_size: tuple[int, int]) -> None:
    """Refuse images of another size than the filters are for."""
    if tuple(images.shape[2:]) != img_size:
        expected = " x ".join(map(str, img_size))
        raise ShapeError(f"images: expected {expected}, got {tuple(images.shape)}; resize() makes other sizes fit")


def small_linear_weights(model: nn.Module) -> None:
    """Linear layers start at a standard deviation of 0.02, without bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
