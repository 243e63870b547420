"""An image classifier whose transformer blocks may lose their MLP and most of their attention's matrices."""

from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP
from regard.mechanisms.heads.reduced import QK, VO, ReducedAttention


class ReducedBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` if there is one."""

    def __init__(self, attention: ReducedAttention, mlp: bool = True, norm: bool = True, residual: bool = True):
        super().__init__()
        dim = attention.dim
        self.residual = residual
        self.norm1 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim) if norm and mlp else nn.Identity()
        self.mlp = MLP(dim) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(self.norm1(x))
        x = x + mixed if self.residual else mixed
        if self.mlp is None:
            return x
        y = self.mlp(self.norm2(x))
        return x + y if self.residual else y


class ReducedTransformer(nn.Module, PyTorchModelHubMixin):
    """The vision transformer of "Reducing the Transformer Architecture to a Minimum" (arXiv:2410.13732).

    Patches are embedded linearly, learned positions added, ``depth`` blocks applied, and the mean token (or a class
    token) classified linearly. (B, channels, image_size, image_size) to logits (B, num_classes).

    Args:
        image_size: height and width, or both as a pair.
        patch_size: of the square patches, dividing the image.
        channels: of the image.
        num_classes: how many.
        dim: C.
        depth: number of blocks.
        num_heads: H, 1 for most reductions.
        mlp: whether blocks have an MLP (GELU, ratio 4).
        qk: see `ReducedAttention`.
        vo: see `ReducedAttention`; or "shared": none in the blocks, and one C×C matrix after the last, which is what
            the products Wv Wo of single-head blocks collapse to where neither residual nor norm nor MLP stands between.
        bias: of the attention's matrices.
        pool: "mean" over the tokens, or a learned "cls" token.
        norm: LayerNorm before attention, MLP and classifier.
        residual: the paper argues without residuals and experiments with them.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        channels: int,
        num_classes: int,
        dim: int = 64,
        depth: int = 6,
        num_heads: int = 1,
        mlp: bool = True,
        qk: QK = "separate",
        vo: VO | Literal["shared"] = "full",
        bias: bool = False,
        pool: Literal["mean", "cls"] = "mean",
        norm: bool = True,
        residual: bool = True,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ArgumentError(f"patch_size: patches of {patch_size} do not divide an image of {height} x {width}")
        if pool not in ("mean", "cls"):
            raise ArgumentError(f"pool: expected mean or cls, got {pool!r}")
        if vo == "shared" and num_heads != 1:
            raise ArgumentError(f"num_heads: vo='shared' is defined for one head, got {num_heads}")
        self.image_shape = (channels, height, width)
        self.embedding = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        count = (height // patch_size) * (width // patch_size) + (pool == "cls")
        self.positions = nn.Parameter(torch.randn(1, count, dim) * 0.02)
        inner: VO = "none" if vo == "shared" else vo
        self.blocks = nn.Sequential(
            *(
                ReducedBlock(ReducedAttention(dim, num_heads, qk, inner, bias, causal=False), mlp, norm, residual)
                for _ in range(depth)
            )
        )
        self.shared_vo = nn.Linear(dim, dim, bias=bias) if vo == "shared" else nn.Identity()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ShapeError(
                f"images: expected (B, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)}"
            )
        x = self.embedding(images).flatten(2).mT
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.shared_vo(self.blocks(x + self.positions)))
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])
