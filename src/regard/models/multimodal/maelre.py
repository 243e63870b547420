"""MAELRE, the Modality Agnostic Efficient Long Range Encoder (arXiv:2507.19409)."""

from collections.abc import Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP
from regard.mechanisms.linear.maelre import AdaptiveAttention


class TokenMerge(nn.Module):
    """Groups of ``factor`` consecutive tokens become one: channels joined, normalised, projected.

    x (B, N, C) to (B, ⌈N / factor⌉, C'); the last group is filled with zeros. A merged token is valid if any of its
    tokens was; padding counts as zeros.
    """

    def __init__(self, dim_in: int, dim_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(factor * dim_in)
        self.proj = nn.Linear(factor * dim_in, dim_out)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        missing = -x.shape[1] % self.factor
        if valid is not None:
            x = x * valid.unsqueeze(-1)
            valid = F.pad(valid, (0, missing)).unflatten(1, (-1, self.factor)).any(-1)
        x = F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, self.factor)).flatten(2)
        return self.proj(self.norm(x)), valid


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, approximation: str, threshold: str | int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = AdaptiveAttention(dim, num_heads, approximation, threshold)
        self.mlp = MLP(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), valid=valid)
        return x + self.mlp(self.norm2(x))


class MAELRE(nn.Module, PyTorchModelHubMixin):
    """One encoder for text, series, audio and images: stages of blocks with token merging between them.

    Reconstructed from the paper's abstract; widths, merging and head are our choices.

    Args:
        num_classes: outputs.
        vocab_size: for token ids (B, N); or
        in_channels: for vectors (B, N, in_channels), such as samples, patches or features; one of the two.
        max_length: longest input; positions are learned.
        dims, depths, num_heads: width, blocks and heads of each stage.
        merge: tokens merged into one after each stage but the last.
        approximation, threshold: see `AdaptiveAttention`.
        mlp_ratio: of the feed-forward layers.
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int | None = None,
        in_channels: int | None = None,
        max_length: int = 4096,
        dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 8),
        merge: Sequence[int] = (4, 4),
        approximation: str = "linear",
        threshold: str | int = "dim",
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if (vocab_size is None) == (in_channels is None):
            raise ArgumentError("vocab_size, in_channels: expected exactly one of them")
        if not len(dims) == len(depths) == len(num_heads) == len(merge) + 1:
            raise ArgumentError(
                f"dims, depths, num_heads, merge: {len(dims)}, {len(depths)} and {len(num_heads)} stages with "
                f"{len(merge)} merges; expected as many of each, and one merge less"
            )
        self.max_length, self.in_channels = max_length, in_channels
        self.stem: nn.Module = (
            nn.Linear(in_channels or 0, dims[0]) if in_channels else nn.Embedding(vocab_size or 0, dims[0])
        )
        self.positions = nn.Parameter(torch.randn(max_length, dims[0]) * 0.02)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, heads, approximation, threshold, mlp_ratio) for _ in range(depth))
            for dim, depth, heads in zip(dims, depths, num_heads, strict=True)
        )
        self.merges = nn.ModuleList(TokenMerge(a, b, m) for a, b, m in zip(dims, dims[1:], merge, strict=False))
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Token ids (B, N) or vectors (B, N, in_channels), valid (B, N) bool; logits (B, num_classes)."""
        expected = 2 if self.in_channels is None else 3
        if x.dim() != expected or x.shape[1] > self.max_length or x.shape[-1] != (self.in_channels or x.shape[-1]):
            wanted = "(B, N)" if expected == 2 else f"(B, N, {self.in_channels})"
            raise ShapeError(f"x: expected {wanted} with N at most {self.max_length}, got {tuple(x.shape)}")
        x = self.stem(x) + self.positions[: x.shape[1]]
        for level, blocks in enumerate(self.stages):
            if level:
                x, valid = self.merges[level - 1](x, valid)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, valid)
        weights = x.new_ones(x.shape[:2]) if valid is None else valid.to(x.dtype)
        mean = (x * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return self.head(self.norm(mean))
