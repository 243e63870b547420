"""Masks from what tokens belong to: documents, groups, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.masks.base import Index, Mask
from regard.masks.sequence import at_least


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """``ids[q] == ids[k]`` with ids that never decrease along the sequence."""

    ids: Tensor  # (batch or 1, N), int64

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return None if len(self.ids) == 1 else len(self.ids)

    @property
    def lengths(self) -> tuple[int | None, int | None]:  # type: ignore[override]
        return self.ids.shape[1], self.ids.shape[1]

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        item = b if self.batch else 0
        return self.ids[item, q_idx] == self.ids[item, k_idx]

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        first_query, last_query, first_key, last_key = (self.ids[:, None, x] for x in (q0, q1 - 1, k0, k1 - 1))
        some = (first_query <= last_key) & (first_key <= last_query)
        least, most = torch.minimum(first_query, first_key), torch.maximum(last_query, last_key)
        return some, least == most

    def count(self, n: int, m: int) -> int | None:
        sizes = (torch.unique_consecutive(ids, return_counts=True)[1] for ids in self.ids)
        return sum(int((size * size).sum()) for size in sizes)

    def __repr__(self) -> str:
        documents = ", ".join(str(len(ids.unique_consecutive())) for ids in self.ids[:4])
        return f"documents(<{documents}{', ...' if len(self.ids) > 4 else ''} over {self.ids.shape[1]} tokens>)"


@dataclass(frozen=True, eq=False, repr=False)
class Groups(Mask):
    """``allowed[query_ids[q], key_ids[k]]``."""

    query_ids: Tensor  # (batch or 1, N), int64
    key_ids: Tensor  # (batch or 1, M), int64
    allowed: Tensor  # (query groups, key groups), bool

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return None if len(self.query_ids) == 1 else len(self.query_ids)

    @property
    def lengths(self) -> tuple[int | None, int | None]:  # type: ignore[override]
        return self.query_ids.shape[1], self.key_ids.shape[1]

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        item = b if self.batch else 0
        return self.allowed[self.query_ids[item, q_idx], self.key_ids[item, k_idx]]

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        queries = _present(self._sorted_queries, self.query_ids, self.allowed.shape[0], q0, q1)
        keys = _present(self._sorted_keys, self.key_ids, self.allowed.shape[1], k0, k1)
        some = torch.zeros_like(queries[:, :1])
        every = torch.ones_like(some)
        for group, allowed in enumerate(self.allowed):
            here = queries[:, group, None]
            some |= here & keys[:, allowed].any(1, keepdim=True)
            every &= ~here | ~keys[:, ~allowed].any(1, keepdim=True)
        return some, every

    @cached_property
    def _sorted_queries(self) -> Tensor:
        return _by_group(self.query_ids, self.allowed.shape[0])

    @cached_property
    def _sorted_keys(self) -> Tensor:
        return _by_group(self.key_ids, self.allowed.shape[1])

    def __repr__(self) -> str:
        (n, m), (g, f) = self.lengths, self.allowed.shape
        return f"groups(<{n} queries in {g} groups, {m} keys in {f} groups>)"


@dataclass(frozen=True, eq=False, repr=False)
class Padding(Mask):
    """``valid[b, h, k]``."""

    valid: Tensor  # (batch or 1, heads or 1, M), bool

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return None if self.valid.shape[0] == 1 else self.valid.shape[0]

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return None if self.valid.shape[1] == 1 else self.valid.shape[1]

    @property
    def lengths(self) -> tuple[int | None, int | None]:  # type: ignore[override]
        return None, self.valid.shape[-1]

    @cached_property
    def _before(self) -> Tensor:
        """(batch, heads, M + 1) int32: valid keys before each position."""
        return torch.nn.functional.pad(self.valid.cumsum(-1, dtype=torch.int32), (1, 0))

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return self.valid[b if self.batch else 0, h if self.heads else 0, k_idx]

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        valid = self._before[..., k1] - self._before[..., k0]
        return valid > 0, valid == k1 - k0

    def count(self, n: int, m: int) -> int | None:
        return n * int(self.valid[..., :m].sum())

    def __repr__(self) -> str:
        return f"padding(<{' x '.join(map(str, self.valid.shape))}, {int(self.valid.sum())} valid>)"


def documents(lengths: Sequence[int] | None = None, *, ids: Tensor | None = None) -> Mask:
    """Tokens see the tokens of their own document, in sequences packed from several.

    Args:
        lengths: tokens per document, in order.
        ids: instead of ``lengths``, the document of each token, (N,) or (batch, N), never decreasing. For members that
            are not contiguous use `groups`.
    """
    if (lengths is None) == (ids is None):
        raise ArgumentError("documents needs either lengths or ids")
    if lengths is not None:
        for length in lengths:
            at_least("lengths", length, 0)
        ids = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    assert ids is not None
    ids = _id_rows("ids", ids)
    if bool((ids.diff() < 0).any()):
        raise ArgumentError("ids must never decrease along the sequence; use groups for scattered members")
    return Documents(ids)


def groups(ids: Tensor, allowed: Tensor, key_ids: Tensor | None = None) -> Mask:
    """Tokens belong to groups, and a relation says which groups see which.

    Args:
        ids: the group of each query, integers (N,) or (batch, N).
        allowed: bool (query groups, key groups): whether queries of one group see keys of another.
        key_ids: the group of each key, (M,) or (batch, M); the queries' groups if None (self-attention).
    """
    if allowed.dtype != torch.bool or allowed.dim() != 2:
        raise ShapeError(
            f"allowed must be bool (query groups, key groups), got {allowed.dtype} of shape {tuple(allowed.shape)}"
        )
    query_rows = _id_rows("ids", ids)
    key_rows = query_rows if key_ids is None else _id_rows("key_ids", key_ids)
    if len(query_rows) != len(key_rows):
        batch = max(len(query_rows), len(key_rows))
        if 1 not in (len(query_rows), len(key_rows)):
            raise ShapeError(f"ids and key_ids must agree on batch, got {len(query_rows)} and {len(key_rows)}")
        query_rows, key_rows = query_rows.expand(batch, -1), key_rows.expand(batch, -1)
    for name, rows, count in (("ids", query_rows, allowed.shape[0]), ("key_ids", key_rows, allowed.shape[1])):
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            raise ArgumentError(
                f"{name} must name groups 0 to {count - 1} of allowed, got {int(rows.min())} to {int(rows.max())}"
            )
    return Groups(query_rows, key_rows, allowed)


def padding(valid: Tensor) -> Mask:
    """Keys that exist: bool (M,), (batch, M) or (batch, heads, M), False for padding."""
    if valid.dtype != torch.bool or valid.dim() not in (1, 2, 3) or valid.numel() == 0:
        raise ShapeError(
            f"valid must be bool (M,), (batch, M) or (batch, heads, M), got {valid.dtype} of shape {tuple(valid.shape)}"
        )
    return Padding(valid if valid.dim() == 3 else valid.reshape(-1, 1, valid.shape[-1]))


def _id_rows(name: str, ids: Tensor) -> Tensor:
    """``ids`` as int64 (batch or 1, N)."""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ShapeError(f"{name} must be integers (N,) or (batch, N), got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.reshape(-1, ids.shape[-1]).long()


def _by_group(ids: Tensor, groups: int) -> Tensor:
    """Sorted ``(item * groups + group) * N + position`` of every token, closed by a number beyond them all."""
    batch, n = ids.shape
    keys = (torch.arange(batch)[:, None] * groups + ids) * n + torch.arange(n)
    return torch.cat([keys.flatten().sort().values, torch.tensor([batch * groups * n * 2])])


def _present(ordered: Tensor, ids: Tensor, groups: int, start: Tensor, stop: Tensor) -> Tensor:
    """(batch, groups, R): whether a token of the group stands in ``start <= position < stop``."""
    batch, n = ids.shape
    base = torch.arange(batch * groups).view(batch, groups, 1) * n
    return ordered[torch.searchsorted(ordered, base + start)] < base + stop
