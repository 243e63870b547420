"""Masks given as tables: dense matrices, and blocks chosen at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.masks.base import Index, Mask
from regard.masks.sequence import at_least


@dataclass(frozen=True, eq=False, repr=False)
class Table(Mask):
    """Query block ``q // block_size[0]`` sees key block ``k // block_size[1]`` where the table says so."""

    table: Tensor  # (batch or 1, heads or 1, query blocks, key blocks), bool
    block_size: tuple[int, int]

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return None if self.table.shape[1] == 1 else self.table.shape[1]

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return None if self.table.shape[0] == 1 else self.table.shape[0]

    @cached_property
    def _sums(self) -> Tensor:
        """Summed-area table (batch, heads, (query blocks + 1) * (key blocks + 1)), int32."""
        sums = self.table.cpu().cumsum(-1, dtype=torch.int32).cumsum_(-2)
        return torch.nn.functional.pad(sums, (1, 0, 1, 0)).flatten(-2)

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        item = b if self.batch else 0
        head = h if self.heads else 0
        return self.table[item, head, q_idx // self.block_size[0], k_idx // self.block_size[1]]

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        (bq, bk), width = self.block_size, self.table.shape[-1] + 1
        top, bottom = q0 // bq, (q1 - 1) // bq + 1
        left, right = k0 // bk, (k1 - 1) // bk + 1
        corner = [self._sums[..., row * width + column] for row in (top, bottom) for column in (left, right)]
        allowed = corner[3] - corner[2] - corner[1] + corner[0]
        return allowed > 0, allowed == (bottom - top) * (right - left)

    def check(self, n: int, m: int, offset: int | None = None) -> None:
        for name, first, size, block, count in (
            ("n", offset or 0, n, self.block_size[0], self.table.shape[-2]),
            ("m", 0, m, self.block_size[1], self.table.shape[-1]),
        ):
            needed = -(-(first + size) // block)
            if first < 0 or needed > count or (needed < count and offset is None):
                raise ShapeError(
                    f"mask {self!r} has {count} blocks of {block} along {name}; "
                    f"{name}={size}{f' from position {first}' if first else ''} needs {needed}"
                )

    def __repr__(self) -> str:
        kind = "from_dense" if self.block_size == (1, 1) else "from_blocks"
        size = "" if self.block_size == (1, 1) else f", block_size={self.block_size}"
        return f"{kind}(<{' x '.join(map(str, self.table.shape))} table>{size})"


def from_dense(mask: Tensor) -> Mask:
    """A bool matrix of shape (n, m), (heads, n, m) or (batch, heads, n, m) as a mask; True means "may see"."""
    return Table(_four_axes("mask", mask), (1, 1))


def from_blocks(table: Tensor, block_size: int | tuple[int, int] = 128) -> Mask:
    """Blocks chosen at run time.

    Args:
        table: bool, (query blocks, key blocks), (heads, ...) or (batch, heads, ...); True means the block is visible.
        block_size: tokens per block, one number or (queries, keys). The last blocks may be partial.
    """
    return Table(_four_axes("table", table), block_pair(block_size))


def from_lists(index: Tensor, num_key_blocks: int, block_size: int | tuple[int, int] = 128) -> Mask:
    """Blocks chosen at run time, as padded lists of key blocks.

    Args:
        index: integers, (query blocks, L), (heads, query blocks, L) or (batch, heads, query blocks, L): the key blocks
            each query block sees, in any order. Negative entries are padding.
        num_key_blocks: number of key blocks there are.
        block_size: tokens per block, one number or (queries, keys).
    """
    if index.dim() not in (2, 3, 4) or index.is_floating_point() or index.dtype == torch.bool:
        raise ShapeError(
            f"index must be an integer tensor of 2 to 4 dimensions, got {index.dtype} of shape {tuple(index.shape)}"
        )
    if index.numel() and int(index.max()) >= num_key_blocks:
        raise ArgumentError(f"index names key block {int(index.max())}, there are {num_key_blocks}")
    table = torch.zeros(*index.shape[:-1], num_key_blocks + 1, dtype=torch.bool, device=index.device)
    table.scatter_(-1, torch.where(index < 0, num_key_blocks, index).long(), True)
    return from_blocks(table[..., :num_key_blocks], block_size)


def random_blocks(
    n: int,
    m: int | None = None,
    block_size: int | tuple[int, int] = 128,
    density: float = 0.1,
    seed: int = 0,
    heads: int | None = None,
) -> Mask:
    """In every query block row, the same number of key blocks drawn at random: ``density`` of them, at least one."""
    if not 0 < density <= 1:
        raise ArgumentError(f"density must be above 0 and at most 1, got {density}")
    bq, bk = block_pair(block_size)
    rows, columns = -(-at_least("n", n, 1) // bq), -(-at_least("m", n if m is None else m, 1) // bk)
    kept = max(1, round(density * columns))
    order = torch.rand(heads or 1, rows, columns, generator=torch.Generator().manual_seed(seed)).topk(kept).indices
    return from_lists(order, columns, (bq, bk))


def block_pair(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """``block_size`` as (queries, keys)."""
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2:
        raise ArgumentError(f"block_size must be one number or (queries, keys), got {block_size!r}")
    return at_least("block_size", pair[0], 1), at_least("block_size", pair[1], 1)


def _four_axes(name: str, table: Tensor) -> Tensor:
    if not isinstance(table, Tensor) or table.dtype != torch.bool or table.dim() not in (2, 3, 4):
        got = f"{table.dtype} of shape {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ShapeError(f"{name} must be a bool tensor of 2, 3 or 4 dimensions ([[batch,] heads,] n, m), got {got}")
    if 0 in table.shape:
        raise ShapeError(f"{name} must not be empty, got shape {tuple(table.shape)}")
    return table.reshape(*(1,) * (4 - table.dim()), *table.shape)
