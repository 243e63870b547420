"""`choose`: from queries and keys to a mask over key blocks."""

import torch
from torch import Tensor

from regard.attention.problem import checked
from regard.errors import ArgumentError
from regard.masks import Mask, from_blocks
from regard.masks.table import block_pair
from regard.select import rules
from regard.select.summary import block_scores, pool


@torch.no_grad()
def choose(
    query: Tensor,
    key: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    block_size: int | tuple[int, int] = 64,
    pooling: str = "mean",
    shared: str = "head",
    sinks: int = 1,
    local: int = 1,
    causal: bool = True,
    offset: int | None = None,
    scale: float | None = None,
) -> Mask:
    """Choose for every query block the key blocks it sees, by the scores between their summaries.

    Causal choices are safe: query block i chooses among the blocks that lie wholly before it, its choice depends on
    nothing after it, and the blocks it overlaps are always kept. The result is a table over blocks; intersect it with
    `masks.causal()` (shifted by the offset) for the pairs inside the blocks on the diagonal.

    Exactly one of `top_k`, `top_p` and `threshold` is given.

    Args:
        query: (B, H, N, D).
        key: (B, Hk, M, D).
        top_k: blocks seen per query block, always-kept ones included (which are kept even if they are more).
        top_p: besides the always-kept, the fewest blocks with this much of the softmax over the remaining scores.
        threshold: besides the always-kept, blocks that score at least this, in units of attention logits.
        block_size: tokens per block, one number or (queries, keys).
        pooling: "mean", "max" or "norm", how a block becomes one vector (see `pool`).
        shared: "head", "group" or "all", which heads choose together (see `block_scores`).
        sinks: first key blocks that are always kept.
        local: nearest key blocks on each side that are always kept; 1 keeps the blocks the query block overlaps.
        causal: never choose a block of the future.
        offset: position of the first query among the keys; by default ``M - N`` if causal (the queries are the newest
            tokens) and 0 otherwise.
        scale: factor on the scores, ``1/sqrt(D)`` by default.

    Returns:
        A mask for N queries and M keys, of batch B and H heads (one head if ``shared="all"``).
    """
    p = checked(query, key, key, scale=scale)
    _check(top_k, top_p, threshold, sinks, local, causal)
    if offset is None:
        offset = p.m - p.n if causal else 0
    if causal and not 0 <= offset <= p.m - p.n:
        raise ArgumentError(f"offset: expected 0 to {p.m - p.n} for {p.n} queries and {p.m} keys, got {offset}")
    bq, bk = block_pair(block_size)
    scores = block_scores(pool(query, bq, pooling), pool(key, bk, pooling), shared, p.scale)

    first = offset + torch.arange(0, p.n, bq, device=p.device).unsqueeze(-1)
    last = (first + bq).clamp(max=offset + p.n) - 1
    block = torch.arange(scores.shape[-1], device=p.device)
    eligible = block <= last // bk if causal else torch.ones_like(block <= last)
    near = (block > first // bk - local) & (block < last // bk + local)
    kept = eligible & (near | (block < sinks))
    scores = scores.masked_fill(~eligible | kept, -torch.inf)
    if top_k is not None:
        chosen = rules.top_k(scores, top_k - kept.sum(-1))
    elif top_p is not None:
        chosen = rules.top_p(scores, top_p)
    else:
        assert threshold is not None
        chosen = rules.threshold(scores, threshold)
    table = chosen | kept
    if table.shape[1] not in (1, p.heads):
        table = table.repeat_interleave(p.groups, dim=1)
    return from_blocks(table, (bq, bk))


def _check(
    top_k: int | None, top_p: float | None, threshold: float | None, sinks: int, local: int, causal: bool
) -> None:
    given = [name for name, x in (("top_k", top_k), ("top_p", top_p), ("threshold", threshold)) if x is not None]
    if len(given) != 1:
        raise ArgumentError(f"expected exactly one of top_k, top_p and threshold, got {' and '.join(given) or 'none'}")
    if top_k is not None and top_k < 1:
        raise ArgumentError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ArgumentError(f"top_p: expected a share from 0 to 1, got {top_p}")
    if sinks < 0:
        raise ArgumentError(f"sinks: expected at least 0, got {sinks}")
    if local < (1 if causal else 0):
        raise ArgumentError(f"local: expected at least {1 if causal else 0}, got {local}; 1 keeps a query's own block")
