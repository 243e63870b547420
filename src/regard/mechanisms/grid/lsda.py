"""Long short distance attention (CrossFormer): groups of neighbours, or groups that sample a large region."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.layers.relative_position import DynamicPositionBias
from regard.masks import Mask
from regard.mechanisms.grid.base import GridMechanism

MODES = ("short", "long")


def short_distance(grid: Sequence[int], group_size: int) -> Mask:
    """Tokens see their window of G × G neighbours."""
    return masks.windows(grid, group_size)


def long_distance(grid: Sequence[int], group_size: int, interval: int) -> Mask:
    """Tokens see each other if they are in one region of G I × G I tokens, and whole steps of I apart."""
    region = group_size * interval
    return masks.product(grid, [masks.windows((side,), region) & masks.strided(interval) for side in grid])


class LSDAttention(GridMechanism):
    """Attention inside groups of G × G tokens (CrossFormer, arXiv:2108.00154).

        short: a group is a window of neighbours                                            `short_distance`
        long:  a group takes every I-th row and column of a region of G I × G I tokens      `long_distance`
        y = Wo softmax(q kᵀ / √D + DPB(offset)) v

    Long distance costs what short distance costs. The bias comes from a network, so G may be another at every call of
    a stage; in "long" it counts steps of I. x (B, H, W, C) to the same, any H and W: the grid is filled up with zeros
    that are no keys. Where the grid has no more than G rows or columns, groups are windows of min(H, W). Exact,
    noncausal.

    Args:
        dim: C.
        num_heads: heads.
        group_size: G.
        interval: I; None for as many as it takes to sample the whole height.
        mode: "short" or "long".
        qkv_bias: of the query, key and value projections.
        pad_type: 0 fills up at the bottom and right, 1 on both sides.
        mask_padding: False lets tokens see the zeros too, as keys that are the projection's bias.
    """

    cost: ClassVar[str] = "O(N G² C)"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int = 7,
        interval: int | None = 8,
        mode: str = "short",
        qkv_bias: bool = True,
        pad_type: int = 0,
        mask_padding: bool = True,
    ):
        super().__init__()
        per_head(dim, num_heads)
        for name, value in (("group_size", group_size), ("interval", interval)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if mode not in MODES:
            raise ArgumentError(f"mode: expected 'short' or 'long', got {mode!r}")
        if pad_type not in (0, 1):
            raise ArgumentError(f"pad_type: expected 0 or 1, got {pad_type!r}")
        self.dim, self.num_heads, self.group_size, self.interval = dim, num_heads, group_size, interval
        self.mode, self.pad_type, self.mask_padding = mode, pad_type, mask_padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.pos = DynamicPositionBias(dim, num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        batch, height, width, _ = x.shape
        size, step = self._groups(height, width)
        top, bottom = self._fill(height, size * step)
        left, right = self._fill(width, size * step)
        filled = bool(top + bottom + left + right)
        mask = None
        if filled:
            x = F.pad(x, (0, 0, left, right, top, bottom))
            if self.mask_padding:
                inside = F.pad(x.new_ones(1, height, width, 1, dtype=torch.bool), (0, 0, left, right, top, bottom))
                mask = _cut(inside, size, step).repeat(batch, 1, 1)[:, None].mT
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(_cut(x, size, step)).chunk(3, -1))
        y = self.proj(merge_heads(attention(q, k, v, mask=mask, bias=self.pos(size)[None])))
        y = _join(y, size, step, *x.shape[1:3])
        return y[:, top : top + height, left : left + width] if filled else y

    def _groups(self, height: int, width: int) -> tuple[int, int]:
        """Side of the groups, and the step between their tokens."""
        size = min(self.group_size, height, width)
        if self.mode == "short" or min(height, width) <= self.group_size:
            return size, 1
        return size, -(-height // size) if self.interval is None else self.interval

    def _fill(self, side: int, multiple: int) -> tuple[int, int]:
        missing = -side % multiple
        before = missing // 2 if self.pad_type else 0
        return before, missing - before


def _cut(x: Tensor, size: int, step: int) -> Tensor:
    return rearrange(x, "b (rh gh ih) (rw gw iw) c -> (b rh rw ih iw) (gh gw) c", gh=size, gw=size, ih=step, iw=step)


def _join(y: Tensor, size: int, step: int, height: int, width: int) -> Tensor:
    return rearrange(
        y,
        "(b rh rw ih iw) (gh gw) c -> b (rh gh ih) (rw gw iw) c",
        gh=size,
        gw=size,
        ih=step,
        iw=step,
        rh=height // (size * step),
        rw=width // (size * step),
    )
