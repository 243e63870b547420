"""The block masks of DHSA's later release: a choice of fixed-size key blocks for every query block and head.

All take queries (B, H, N, D) and keys (B, H, M, D) whose lengths the block sizes divide, and return a bool table
(B, H, query blocks, key blocks) for `masks.from_blocks(table, (q_block_size, k_block_size))`, to be intersected with
`masks.causal()`. k is the number of key blocks a query block sees.

- `topk_blocks`: the k best by the scores of block means, before causality.
- `a_shape_blocks`: the first and the latest block, the best between; all blocks where they are no more than k.
- `vertical_slash_blocks`: as `a_shape_blocks`, but scored by the columns and diagonals the last query block attends to.
- `vertical_slash_blocks_coarse`: the same judged on block means, never touching a token's score.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from regard import select
from regard.errors import ArgumentError, ShapeError


class _Rows(NamedTuple):
    """What is the same for every head: which key blocks a query block keeps anyway, and how many it may add."""

    recent: Tensor  # (nq, 1) latest causal key block
    start: Tensor  # (nq, 1) key block of the block's first query
    dense: Tensor  # (nq, 1) rows that keep every causal block
    block: Tensor  # (nk,)

    @property
    def causal(self) -> Tensor:
        return self.block <= self.recent

    @property
    def middle(self) -> Tensor:
        """Blocks that scores decide about: neither the first nor the latest."""
        return (self.block > 0) & (self.block < self.recent)

    def finish(self, scores: Tensor, kept: Tensor, reserved: Tensor, k: int) -> Tensor:
        """Dense rows whole; the others what is `kept` and of the middle the best k minus `reserved` (nq, 1)."""
        budget = torch.minimum(k - reserved, self.recent - 1).clamp(min=0).squeeze(-1)
        best = select.top_k(scores.masked_fill(~self.middle, -torch.inf), budget)
        return torch.where(self.dense, self.causal, kept | best)


def topk_blocks(query: Tensor, key: Tensor, k: int, q_block_size: int, k_block_size: int) -> Tensor:
    """The k key blocks with the highest scores of block means; causality is left to the caller."""
    _check(query, key, k, q_block_size, k_block_size)
    return select.top_k(_mean_scores(query, key, q_block_size, k_block_size), k)


def a_shape_blocks(query: Tensor, key: Tensor, k: int, q_block_size: int, k_block_size: int) -> Tensor:
    """The first and the latest causal block, and between them the best by the scores of block means."""
    _check(query, key, k, q_block_size, k_block_size)
    rows = _rows(query, key, k, q_block_size, k_block_size, dense_ends=False)
    scores = _mean_scores(query, key, q_block_size, k_block_size)
    return _first_and_latest(rows, scores, k)


def vertical_slash_blocks(
    query: Tensor, key: Tensor, k: int, q_block_size: int, k_block_size: int, vertical_ratio: float = 0.5
) -> Tensor:
    """The first and the latest causal block, and between them those that the strongest columns and diagonals touch.

    Of the attention weights of the last query block, the tokens of k key blocks' worth of lines are kept: a share
    `vertical_ratio` of columns, the rest diagonals, each weighing what it receives. A key block scores the sum of the
    columns in it and the diagonals through it. The first k blocks' worth of queries and the last block stay dense.
    """
    _check(query, key, k, q_block_size, k_block_size, vertical_ratio)
    rows = _rows(query, key, k, q_block_size, k_block_size, dense_ends=True)
    batch, heads, m, dim = key.shape
    columns = min(m, int(min(k * k_block_size, m) * vertical_ratio))
    diagonals = min(k * k_block_size, m) - columns

    n_last = min(q_block_size, query.shape[2], m)
    token = torch.arange(m, device=key.device)
    last = token[-n_last:].unsqueeze(-1)
    logits = query[:, :, -n_last:].float() @ key.float().mT / math.sqrt(dim)
    weights = logits.masked_fill(token > last, -torch.inf).softmax(-1)

    best, index = weights.sum(2).topk(columns, dim=-1)
    vertical = best.new_zeros(batch, heads, len(rows.block)).scatter_add_(-1, index // k_block_size, best)
    at = last - token  # key that lies `token` before each of the last queries
    along = weights.gather(-1, at.clamp(min=0).expand(batch, heads, -1, -1)) * (at >= 0)
    best, distance = along.sum(2).topk(diagonals, dim=-1)
    slash = best.new_zeros(batch, heads, len(rows.recent), len(rows.block))
    start = torch.arange(len(rows.recent), device=key.device).unsqueeze(-1) * q_block_size - distance.unsqueeze(-2)
    stop = start + q_block_size - 1
    from_block, to_block = start.clamp(0, m - 1) // k_block_size, stop.clamp(0, m - 1) // k_block_size
    for step in range(-(-q_block_size // k_block_size) + 1):
        touched = from_block + step
        counts = (stop >= 0) & (touched <= to_block) & (touched <= rows.recent)
        slash.scatter_add_(-1, touched.clamp(max=len(rows.block) - 1), best.unsqueeze(-2) * counts)
    return _first_and_latest(rows, vertical.unsqueeze(-2) + slash, k)


def vertical_slash_blocks_coarse(
    query: Tensor, key: Tensor, k: int, q_block_size: int, k_block_size: int, vertical_ratio: float = 0.5
) -> Tensor:
    """`vertical_slash_blocks` on block means: lines are key blocks, weighed by their raw score with the last block.

    The blocks a query block overlaps are all kept.
    """
    _check(query, key, k, q_block_size, k_block_size, vertical_ratio)
    rows = _rows(query, key, k, q_block_size, k_block_size, dense_ends=True)
    scores = _mean_scores(query[:, :, -q_block_size:], key, q_block_size, k_block_size).squeeze(2)
    scores = scores / math.sqrt(key.shape[-1])
    recent = min(len(rows.block) - 1, (query.shape[2] - 1) // k_block_size)
    scores = scores.masked_fill(rows.block > recent, -torch.inf)

    k = min(k, len(rows.block))
    columns = int(k * vertical_ratio)
    best, index = scores.topk(columns, dim=-1)
    vertical = torch.zeros_like(scores).scatter_add_(-1, index, best)
    best, index = scores.topk(k - columns, dim=-1)
    slash = best.new_zeros(*scores.shape[:2], len(rows.recent), len(rows.block))
    from_block, to_block = (edge - (recent - index).unsqueeze(-2) for edge in (rows.start, rows.recent))
    for step in range(int((rows.recent - rows.start).max()) + 1):
        touched = from_block + step
        counts = (touched <= to_block) & (touched > 0) & (touched < rows.recent)
        slash.scatter_add_(-1, touched.clamp(0, len(rows.block) - 1), best.unsqueeze(-2) * counts)

    own = (rows.block >= rows.start) & rows.causal
    reserved = rows.recent - rows.start + 1 + (rows.start > 0)
    return rows.finish(vertical.unsqueeze(-2) + slash, own | (rows.block == 0), reserved, k)


def _rows(query: Tensor, key: Tensor, k: int, q_block_size: int, k_block_size: int, dense_ends: bool) -> _Rows:
    blocks = key.shape[2] // k_block_size
    row = torch.arange(query.shape[2] // q_block_size, device=key.device).unsqueeze(-1)
    recent = (((row + 1) * q_block_size - 1) // k_block_size).clamp(max=blocks - 1)
    start = (row * q_block_size // k_block_size).clamp(max=blocks - 1)
    dense = recent + 1 <= min(k, blocks)
    if dense_ends:
        tokens = min(k, blocks) * k_block_size
        dense = dense | (row < -(-tokens // q_block_size)) | (row == len(row) - 1)
    return _Rows(recent, start, dense, torch.arange(blocks, device=key.device))


def _first_and_latest(rows: _Rows, scores: Tensor, k: int) -> Tensor:
    kept = (rows.block == 0) | (rows.block == rows.recent)
    return rows.finish(scores, kept, 1 + (rows.recent != 0).long(), min(k, len(rows.block)))


def _mean_scores(query: Tensor, key: Tensor, q_block_size: int, k_block_size: int) -> Tensor:
    return select.block_scores(select.pool(query, q_block_size), select.pool(key, k_block_size))


def _check(
    query: Tensor, key: Tensor, k: int, q_block_size: int, k_block_size: int, vertical_ratio: float = 0.5
) -> None:
    if query.dim() != 4 or key.dim() != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ShapeError(
            "query and key: expected (B, H, N, D) and (B, H, M, D) with the same B, H and D, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    for name, length, size in (("query", query.shape[2], q_block_size), ("key", key.shape[2], k_block_size)):
        if size < 1 or length == 0 or length % size:
            raise ShapeError(f"{name}: expected a length that blocks of {size} divide, got {length}")
    if k < 1:
        raise ArgumentError(f"k must be at least 1, got {k}")
    if not 0 <= vertical_ratio <= 1:
        raise ArgumentError(f"vertical_ratio must be between 0 and 1, got {vertical_ratio}")
