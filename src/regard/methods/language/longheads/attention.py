"""LongHeads as functions of raw (not yet rotated) queries and keys.

Notation: w = window_size, the tokens of a chunk; n = atten_length / w, the chunks a query attends to; S =
begin_selective_length; R(x, p) = rotary embedding of x at position p; c(i) = floor(i / w), the chunk of token i.

Queries before S attend as usual. A later query i attends to n chunks: the first, the one before its own, its own up to
itself, and of the others the n - 3 with the largest q_i · r_c, where r_c is the chunk's key (`chunk_features`). The
chosen chunks are laid side by side as if nothing lay between them, at positions 0 .. n w - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import masks
from regard.attention import Partial, attention, merge
from regard.errors import ArgumentError
from regard.positions import rotate
from regard.sites import Rotary

_MEMORY = 2**22  # elements of the largest intermediate; queries are processed in runs that keep to it
_TILE = 64  # queries that attend to one chunk together


@dataclass(frozen=True)
class LongHeadsConfig:
    """Sizes of LongHeads, in tokens.

    Attributes:
        window_size: tokens per chunk.
        atten_length: the most keys a query attends to; `atten_length // window_size` chunks, at least three.
        begin_selective_length: position from which queries choose chunks; before it attention is ordinary.
        include_self: whether a query of a prompt sees itself. The published code leaves it out there (position i sees
            its chunk up to i - 1) and not in decoding, against the paper; False reproduces that, True follows the
            paper throughout, so that decoding continues exactly what a longer prompt would give.
    """

    window_size: int = 256
    atten_length: int = 4096
    begin_selective_length: int = 4096
    include_self: bool = False

    def __post_init__(self) -> None:
        w, n = self.window_size, self.num_chunks
        if n < 3:
            raise ArgumentError(
                f"atten_length must be at least three chunks of window_size={w}, got {self.atten_length}"
            )
        if self.begin_selective_length < n * w or self.begin_selective_length % w:
            raise ArgumentError(
                f"begin_selective_length must be a multiple of window_size={w} and at least {n * w}, "
                f"got {self.begin_selective_length}"
            )

    @property
    def num_chunks(self) -> int:
        if self.window_size < 1:
            raise ArgumentError(f"window_size must be at least 1, got {self.window_size}")
        return self.atten_length // self.window_size


def chunk_features(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, window_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One query and one key that stand for each chunk.

        O_c = softmax(q~ k~ᵀ · scale) v      attention of chunk c to itself, both ways, at positions 0 .. w - 1
        f_c = mean_t O_c[t]                  chunk query
        r_c = softmax(f_c k~ᵀ · scale) k~    chunk key

    Args:
        query: (B, H, g·w, D) raw queries of g whole chunks.
        key: (B, Hk, g·w, D) raw keys. value: (B, Hk, g·w, D).

    Returns:
        f and r, (B, H, g, D) each.
    """
    batch, heads = query.shape[:2]
    q, k, v = (_fold_chunks(x, window_size) for x in (query, key, value))
    cos, sin = rotary.angles(torch.arange(window_size, device=query.device), query)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    chunk_query = attention(q, k, v, scale=scale).mean(-2, keepdim=True)
    chunk_key = attention(chunk_query, k, k, scale=scale)

    def unfold(x: Tensor) -> Tensor:
        return x.view(batch, -1, heads, x.shape[-1]).transpose(1, 2)

    return unfold(chunk_query), unfold(chunk_key)


def longheads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_key: Tensor,
    rotary: Rotary,
    config: LongHeadsConfig,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last N of M tokens, each to the chunks its head chooses.

    Work per query and head: M / w scores of chunks, and at most `atten_length` keys.

    Args:
        query: (B, H, N, D) raw queries.
        key: (B, Hk, M, D) raw keys. value: (B, Hk, M, Dv).
        chunk_key: (B, H, floor(M / w), D), `chunk_features` of all whole chunks.
        rotary: the model's rotary embedding.
        scale: ``1/sqrt(D)`` by default.

    Returns:
        (B, H, N, Dv).
    """
    n, m = query.shape[2], key.shape[2]
    past = m - n
    decoding = n == 1 and past > 0
    # the published decoding counts the new token as context already, one earlier than the published prefill does
    begin = config.begin_selective_length - (decoding and not config.include_self)
    ordinary = min(n, max(0, begin - past))
    parts = []
    if ordinary:
        parts.append(_causal(query[:, :, :ordinary], key, value, past, rotary, scale))
    if ordinary < n and decoding:
        parts.append(_decode(query, key, value, chunk_key, rotary, config, scale))
    elif ordinary < n:
        first = past + ordinary
        parts.append(_prefill(query[:, :, ordinary:], key, value, chunk_key, first, rotary, config, scale))
    return torch.cat(parts, dim=2)


def _causal(query: Tensor, key: Tensor, value: Tensor, first: int, rotary: Rotary, scale: float | None) -> Tensor:
    """Ordinary causal attention of the queries at positions first, first + 1, ..."""
    stop = first + query.shape[2]
    cos, sin = rotary.angles(torch.arange(stop, device=query.device), query)
    q, k = rotate(query, cos[first:], sin[first:]), rotate(key[:, :, :stop], cos, sin)
    return attention(q, k, value[:, :, :stop], mask=masks.causal().shift(first), scale=scale)


def _select(query: Tensor, chunk_key: Tensor, own: Tensor, num_chunks: int) -> Tensor:
    """(B, H, N, n - 1) ascending: the chunks before its own, `own` (N,), that each raw query attends to."""
    scores = query @ chunk_key.mT
    chunk = torch.arange(scores.shape[-1], device=scores.device)
    before = own.unsqueeze(-1) - 1
    scores = scores.masked_fill((chunk == 0) | (chunk >= before), -torch.inf)
    best = scores.topk(num_chunks - 3, dim=-1).indices.sort(dim=-1).values
    before = before.expand(*best.shape[:-1], 1)
    return torch.cat((torch.zeros_like(before), best, before), dim=-1)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_key: Tensor,
    rotary: Rotary,
    config: LongHeadsConfig,
    scale: float | None,
) -> Tensor:
    """One new query: gather its n - 1 chunks, append its own up to itself, rotate them to 0, 1, ... in that order."""
    w, m = config.window_size, key.shape[2]
    own = (m - 1) // w if config.include_self else m // w
    chosen = _select(query, chunk_key, torch.tensor([own], device=query.device), config.num_chunks)
    tokens = (chosen.squeeze(2).unsqueeze(-1) * w + torch.arange(w, device=query.device)).flatten(2)
    rest = torch.arange(own * w, m, device=query.device).expand(*tokens.shape[:2], -1)
    tokens = torch.cat((tokens, rest), dim=-1)  # (B, H, P)
    batch, heads = query.shape[:2]
    b = torch.arange(batch, device=query.device)[:, None, None]
    kv_head = torch.arange(heads, device=query.device)[:, None] // (heads // key.shape[1])
    cos, sin = rotary.angles(torch.arange(tokens.shape[-1], device=query.device), query)
    k = rotate(key[b, kv_head, tokens], cos, sin)
    return attention(rotate(query, cos[-1:], sin[-1:]), k, value[b, kv_head, tokens], scale=scale)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_key: Tensor,
    first: int,
    rotary: Rotary,
    config: LongHeadsConfig,
    scale: float | None,
) -> Tensor:
    """Queries at positions first, first + 1, ..., all of which choose chunks.

    Scores depend on differences of positions only, so instead of rotating each chosen chunk to its place, keys are
    rotated once inside their chunk and query i is rotated to (n - 1 - r) w + (i mod w) for the chunk of rank r. Every
    chunk then serves all queries that chose it, whatever its rank among theirs, and what a query gets from its chunks
    is joined by `merge`: no key is gathered per query.
    """
    w, n = config.window_size, config.num_chunks
    batch, heads, total, _ = query.shape
    cos, sin = rotary.angles(torch.arange(n * w, device=query.device), query)
    k, v = (_pad_to_chunks(x, w) for x in (key, value))
    k = rotate(k.unflatten(2, (-1, w)), cos[:w], sin[:w])  # (B, Hk, g, w, D)
    v = v.unflatten(2, (-1, w))
    per_query = batch * heads * max((n - 1) * max(query.shape[-1], value.shape[-1]), chunk_key.shape[2])
    run = max(w, _MEMORY // per_query // w * w)
    rank = torch.arange(n - 1, -1, -1, device=query.device)
    outputs = []
    for start in range(0, total, run):
        q = query[:, :, start : start + run]
        position = first + start + torch.arange(q.shape[2], device=query.device)
        own, inside = position // w, position % w
        at = (rank * w).unsqueeze(-1) + inside  # (n, run): where the query stands for the chunk of each rank
        q_at = rotate(q.unsqueeze(2).expand(-1, -1, n, -1, -1), cos[at], sin[at])  # (B, H, n, run, D)
        chosen = _select(q, chunk_key, own, n)
        parts = _chosen_chunks(q_at[:, :, :-1], k, v, chosen.transpose(2, 3), scale)
        parts.append(_own_chunk(q_at[:, :, -1], k, v, position, config.include_self, scale))
        outputs.append(merge(*parts).out)
    return torch.cat(outputs, dim=2)


def _own_chunk(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, include_self: bool, scale: float | None
) -> Partial:
    """Every query with the tokens of its own chunk that come before it (and itself)."""
    w, n = key.shape[3], query.shape[2]
    first, lead = divmod(int(position[0]), w)
    q = _pad_to_chunks(F.pad(query, (0, 0, lead, 0)), w)
    batch, heads, padded, dim = q.shape
    own = slice(first, first + padded // w)
    q = q.view(batch, heads, -1, w, dim)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, key[:, :, own], value[:, :, own]))
    part = attention(q, k, v, mask=masks.band(0 if include_self else 1, None), scale=scale, return_lse=True)

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, lead : lead + n]

    return Partial(unfold(part.out), unfold(part.lse))


def _chosen_chunks(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float | None) -> list[Partial]:
    """Attention to the chosen chunks, one `Partial` over all queries per rank.

    The (query, rank) pairs are sorted by the chunk they mean and cut into tiles of queries that share a chunk, so the
    work is that of the chosen pairs, in dense tiles.

    Args:
        query: (B, H, n - 1, N, D), rotated for the chunk of each rank.
        key, value: (B, Hk, g, w, ·).
        chosen: (B, H, n - 1, N) chunk of each rank.
    """
    batch, heads, ranks, n, dim = query.shape
    kv_heads, g = key.shape[1:3]
    device = query.device
    row = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    segment = (row * g + chosen).flatten()  # (pairs,)
    order = segment.argsort(stable=True)
    count = segment.bincount(minlength=batch * heads * g)
    tile = min(_TILE, int(count.max()))
    tiles_of = -(-count // tile)
    of_tile = torch.arange(len(count), device=device).repeat_interleave(tiles_of)  # segment of each tile
    nth = torch.arange(len(of_tile), device=device) - (tiles_of.cumsum(0) - tiles_of)[of_tile]
    stop = count.cumsum(0)
    at = (stop - count)[of_tile].unsqueeze(-1) + nth.unsqueeze(-1) * tile + torch.arange(tile, device=device)
    filled = at < stop[of_tile].unsqueeze(-1)
    pair = order[at.clamp(max=len(order) - 1)]  # (tiles, tile)
    target = pair.masked_fill(~filled, len(order))  # what fills up a tile goes to a row that is thrown away
    chunk = of_tile // (heads * g) * kv_heads * g + of_tile // g % heads // (heads // kv_heads) * g + of_tile % g

    q, k, v = query.flatten(0, 3), key.flatten(0, 2), value.flatten(0, 2)
    out = query.new_empty(len(order) + 1, v.shape[-1])
    lse = query.new_empty(len(order) + 1, dtype=torch.promote_types(query.dtype, torch.float32))
    at_once = max(1, _MEMORY // 4 // (max(tile, k.shape[1]) * max(dim, v.shape[-1])))
    for some, chunks, rows in zip(pair.split(at_once), chunk.split(at_once), target.split(at_once), strict=True):
        part = attention(
            q[some].unsqueeze(1), k[chunks].unsqueeze(1), v[chunks].unsqueeze(1), scale=scale, return_lse=True
        )
        out[rows], lse[rows] = part.out.squeeze(1), part.lse.squeeze(1)
    out, lse = out[:-1].view(batch, heads, ranks, n, -1), lse[:-1].view(batch, heads, ranks, n)
    return [Partial(o, s) for o, s in zip(out.unbind(2), lse.unbind(2), strict=True)]


def _pad_to_chunks(x: Tensor, window_size: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[2] % window_size))


def _fold_chunks(x: Tensor, window_size: int) -> Tensor:
    """(B, H, g·w, D) as (B·g, H, w, D)."""
    return x.unflatten(2, (-1, window_size)).transpose(1, 2).flatten(0, 1)
