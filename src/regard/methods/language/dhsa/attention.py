"""The sparse prefill of DHSA (arXiv:2510.24606): score chunks of keys, keep the tokens of the best.

For every block of b queries, with all heads choosing together:

    Q_i = pooled mean over heads of the queries of block i        K_c = pooled mean over heads of the keys of chunk c
    s_ij = Q_i · K_c(j)                                           the score of token j is that of its chunk

and the block attends to `budget` tokens: the latest ones, the first ones, and those of the highest scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import masks, select
from regard.attention import attention
from regard.attention.problem import checked
from regard.errors import ArgumentError
from regard.masks import Mask
from regard.select.summary import segment_of

#: published name -> pooling of query blocks and of key chunks
_POOLING = {"avgpool": ("mean", "mean"), "avgpool_norm": ("norm", "norm"), "maxpool": ("max", "mean")}
_MEMORY = 2**22  # elements of the largest intermediate; query blocks are processed in runs that keep to it

#: (query index, key index) -> whether the pair is allowed, broadcasting to (B, blocks, heads or 1, queries, keys)
Allowed = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DHSAConfig:
    """Sizes of DHSA, in tokens.

    Attributes:
        block_size: queries that choose together.
        budget: keys each block of queries attends to.
        pooling: "avgpool_norm" (sum / sqrt(length)), "avgpool" (mean) or "maxpool" (maximum of queries, mean of keys).
        global_tokens: first keys that every block sees.
        local_tokens: latest keys that every block sees, counted from the block's end.
        instruction_tokens: last queries of the prompt, which attend to everything.
        dedupe: count every key once. As published (False), the first `global_tokens` entries of a block's sorted list
            are overwritten by the first keys; what stood there is lost, and a key that is then listed twice counts
            twice in the softmax. With True the first and latest keys are chosen first and scores fill the rest.
    """

    block_size: int = 64
    budget: int = 2048
    pooling: str = "avgpool_norm"
    global_tokens: int = 128
    local_tokens: int = 128
    instruction_tokens: int = 64
    dedupe: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 1),
            ("budget", 1),
            ("global_tokens", 0),
            ("local_tokens", 1),
            ("instruction_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pooling not in _POOLING:
            raise ArgumentError(f"pooling must be one of {', '.join(_POOLING)}, got {self.pooling!r}")


def dhsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Sequence[Sequence[int]],
    config: DHSAConfig,
    *,
    window: int | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal self-attention of a whole prompt, every block of queries to the keys it chooses.

    Work: L/b · chunks scores of summaries, and L · budget attended pairs.

    Args:
        query: (B, H, L, D). key: (B, Hk, L, D). value: (B, Hk, L, Dv).
        boundaries: chunk boundaries from 0 to L for every batch item.
        window: sliding window of the layer, which bounds the choice.
        mask: the pairs that are allowed among the chosen; by default causal and, as published, ``q - k <= window``.
        scale: ``1/sqrt(D)`` by default.

    Returns:
        The output (B, H, L, Dv), and the keys (B, blocks, K) each block attends to; -1 marks no key.
    """
    checked(query, key, value, mask, scale=scale)
    if mask is None:
        mask = masks.causal() if window is None else masks.causal() & masks.sliding_window(window + 1)
    return attend_blocks(query, key, value, boundaries, config, window, pairs(mask), scale)


def pairs(mask: Mask, item: int | None = None, start: int = 0) -> Allowed:
    """A mask as `Allowed`; with `item`, for this batch item alone, whose tokens begin at slot `start`."""

    def allowed(q: Tensor, k: Tensor) -> Tensor:
        batch, heads = (torch.arange(size or 1, device=k.device) for size in (mask.batch, mask.heads))
        b = batch[:, None, None, None, None] if item is None or not mask.batch else item
        return mask(b, heads[:, None, None], q + start, k + start)

    return allowed


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Sequence[Sequence[int]],
    config: DHSAConfig,
    window: int | None,
    allowed: Allowed,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """`dhsa_attention` for pairs given as a function."""
    length = query.shape[2]
    sparse = max(0, length - config.instruction_tokens)
    indices = choose_keys(query[:, :, :sparse], key, boundaries, config, window)
    everything = torch.arange(length, device=key.device).expand(key.shape[0], 1, -1)
    parts = [
        _gathered(query[:, :, :sparse], key, value, indices, config.block_size, 0, allowed, scale),
        _gathered(query[:, :, sparse:], key, value, everything, length - sparse, sparse, allowed, scale),
    ]
    return torch.cat(parts, dim=2), indices


@torch.no_grad()
def choose_keys(
    query: Tensor, key: Tensor, boundaries: Sequence[Sequence[int]], config: DHSAConfig, window: int | None = None
) -> Tensor:
    """(B, blocks, K) ascending keys for each block of the queries (B, H, N, D); -1 marks no key."""
    b, (batch, _, n, _), m = config.block_size, query.shape, key.shape[2]
    budget = min(config.budget, m)
    if n == 0:
        return torch.empty(batch, 0, budget, dtype=torch.long, device=key.device)
    if window is not None and not config.dedupe:
        budget = min(budget, window)
    of_queries, of_keys = _POOLING[config.pooling]
    q = F.pad(query.mean(1, dtype=torch.float32), (0, 0, 0, -n % b))  # zeros take part in a maximum, as published
    edges = _stack(boundaries, key)
    scores = select.pool(q, b, of_queries) @ select.pool_segments(key.mean(1, dtype=torch.float32), edges, of_keys).mT
    segment = segment_of(edges, m).unsqueeze(1)
    choose = _once if config.dedupe else _as_published
    blocks = torch.arange(scores.shape[1], device=key.device).unsqueeze(-1)
    run = max(1, _MEMORY // (batch * m))
    chosen = [
        choose(part.gather(2, segment.expand(-1, part.shape[1], -1)), block * b, budget, config, window)
        for part, block in zip(scores.split(run, dim=1), blocks.split(run), strict=True)
    ]
    return torch.cat(chosen, dim=1)


def _once(scores: Tensor, start: Tensor, budget: int, config: DHSAConfig, window: int | None) -> Tensor:
    """Every key at most once: the latest first, then the first ones, then by score (B, blocks, M)."""
    key = torch.arange(scores.shape[-1], device=scores.device)
    stop = (start + config.block_size).clamp(max=len(key))
    first = torch.zeros_like(start) if window is None else (start - window + 1).clamp(min=0)
    most = torch.finfo(scores.dtype).max
    scores = scores.masked_fill(key < first + config.global_tokens, most / 2)
    scores = scores.masked_fill(key >= stop - config.local_tokens, most)
    scores = scores.masked_fill((key < first) | (key >= stop), -torch.inf)
    best, index = scores.topk(budget, dim=-1)
    return index.masked_fill(best == -torch.inf, -1).sort(dim=-1).values


def _as_published(scores: Tensor, start: Tensor, budget: int, config: DHSAConfig, window: int | None) -> Tensor:
    """The published lists: the latest keys, the best scores, and the first keys written over the list's beginning."""
    m, block_size = scores.shape[-1], config.block_size
    key = torch.arange(m, device=scores.device)
    upper = start + block_size
    stop = upper.clamp(max=m)
    first = torch.zeros_like(start) if window is None else (upper - window).clamp(min=0)
    slot = torch.arange(budget, device=scores.device)

    local = min(config.local_tokens, budget)
    candidates = (key >= first) & (key < stop - local)
    best = scores.masked_fill(~candidates, -torch.inf).topk(budget - local, dim=-1).indices
    latest = stop - local + torch.arange(local, device=scores.device)
    chosen = torch.cat((best, latest.expand(*best.shape[:-1], -1)), dim=-1).sort(dim=-1).values
    # where fewer keys are allowed than the budget, all of them; the list is filled up with the last key of the prompt
    everything = torch.where(slot < stop - first, first + slot, m - 1)
    chosen = torch.where(stop - first < budget, everything, chosen)

    begin = torch.zeros_like(start) if window is None else (start - window).clamp(min=0)
    return torch.where(slot < config.global_tokens, torch.minimum(begin + slot, stop - 1), chosen)


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    block_size: int,
    first: int,
    allowed: Allowed,
    scale: float | None,
) -> Tensor:
    """Attention of each block of queries (the first at position `first`) to its own keys `indices` (B, blocks, K)."""
    batch, heads, n, dim = query.shape
    if n == 0:
        return query.new_empty(batch, heads, 0, value.shape[-1])
    blocks = F.pad(query, (0, 0, 0, -n % block_size)).unflatten(2, (-1, block_size)).transpose(1, 2)
    # what fills up the last block repeats the last query, so that any mask can be asked about it
    position = first + torch.arange(blocks.shape[1] * block_size, device=query.device).clamp(max=n - 1)
    position = position.view(-1, 1, block_size, 1)
    item = torch.arange(batch, device=query.device)[:, None, None, None]
    head = torch.arange(key.shape[1], device=query.device)[:, None]
    width = key.shape[1] * indices.shape[-1] * max(dim, value.shape[-1])
    run = max(1, _MEMORY // (batch * max(width, block_size * indices.shape[-1])))
    outputs = []
    for q, q_at, k_at in zip(blocks.split(run, 1), position.split(run), indices.split(run, 1), strict=True):
        k_at = k_at.unsqueeze(2)  # (B, run, 1, K)
        present = (k_at >= 0).unsqueeze(-2)
        k_at = k_at.clamp(min=0)
        mask = present & allowed(q_at, k_at.unsqueeze(-2))
        mask = mask.expand(batch, q.shape[1], -1, block_size, -1).flatten(0, 1)
        k, v = key[item, head, k_at].flatten(0, 1), value[item, head, k_at].flatten(0, 1)
        outputs.append(attention(q.flatten(0, 1), k, v, mask=mask, scale=scale).unflatten(0, (batch, -1)))
    return torch.cat(outputs, dim=1).transpose(1, 2).flatten(2, 3)[:, :, :n]


def _stack(boundaries: Sequence[Sequence[int]], key: Tensor) -> Tensor:
    """Boundaries of all batch items (B, S + 1); shorter lists end in empty chunks."""
    if len(boundaries) != key.shape[0]:
        raise ArgumentError(f"boundaries: expected a list for each of {key.shape[0]} items, got {len(boundaries)}")
    longest = max(len(each) for each in boundaries)
    padded = [[*each, *[key.shape[2]] * (longest - len(each))] for each in boundaries]
    return torch.tensor(padded, device=key.device)
