"""What attention did, as statistics of its weights, from queries and keys alone and in blocks of queries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.attention.problem import Problem, checked
from regard.errors import ArgumentError, ShapeError
from regard.masks import Mask

_CHUNK_WEIGHTS = 2**20  # weights held at once: 4 MB in float32, twice
_ROUND = 256  # numbers of keys are rounded up to multiples of it


@dataclass(eq=False)
class Statistics:
    """Of the weights w (B, H, N, M) of one attention, in float32.

    Attributes:
        mass: (B, H, M), Σ_i w_ij: what each key receives from all queries.
        entropy: (B, H, N) in nats; 0 for a query that sees nothing.
        peak: (B, H, N), the largest weight.
        distance: (B, H, bins), the weight that falls on keys as far away as `distance_edges` says, summed over queries.
        spans: (B, H, N, S), the weight on the keys of each span.
        rows: (B, H, R, M), the weights of the chosen queries.
        top_keys, top_weights: (B, H, T, K), the keys with the largest weights of other chosen queries, largest first.
    """

    mass: Tensor
    entropy: Tensor
    peak: Tensor
    distance: Tensor
    spans: Tensor
    rows: Tensor
    top_keys: Tensor
    top_weights: Tensor


def distance_edges(length: int) -> tuple[int, ...]:
    """Bin b holds distances edges[b] <= |i - j| < edges[b + 1]: 0, 1, 2-3, 4-7, ... up to ``length - 1``."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return tuple(edges)


@torch.no_grad()
def statistics(
    query: Tensor,
    key: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    spans: Tensor | None = None,
    rows: Sequence[int] = (),
    top: Sequence[int] = (),
    top_k: int = 8,
    places: Tensor | None = None,
    valid: Tensor | None = None,
    heads: Sequence[int] | None = None,
) -> Statistics:
    """Statistics of ``softmax(scale · q kᵀ + bias | mask)``; at most a few rows of it exist at a time.

    Args:
        query: (B, H, N, D), of the last N of M positions.
        key: (B, Hk, M, D), where Hk divides H.
        mask, bias, scale: as in `regard.attention`.
        spans: (B or 1, H or 1, M, S) bool, which keys belong to each span; none by default.
        rows: queries whose weights are kept.
        top, top_k: queries of which the keys with the largest weights are kept, and how many of them.
        places: (M, d) integers, where each token lies, such as its row and column in a picture; distance is the largest
            difference along any axis. Negative for a token that lies nowhere, whose distances do not count. By default
            tokens lie in a row.
        valid: (B, N) bool, False for queries that do not count (padding): their statistics are 0.
        heads: query heads to look at, in this order; then H is their number. All by default.

    Raises:
        ShapeError, ArgumentError: as in `regard.attention`.
    """
    p = checked(query, key, key, mask, bias, scale)
    chosen = list(range(p.heads)) if heads is None else list(heads)
    if not all(0 <= head < p.heads for head in chosen):
        raise ArgumentError(f"heads: expected some of 0..{p.heads - 1}, got {chosen}")

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(p.batch, len(chosen), *shape, device=p.device)

    if places is None:
        places = torch.arange(p.m)[:, None]
    elif places.ndim != 2 or places.shape[0] != p.m:
        raise ShapeError(f"places: expected ({p.m}, d), got {tuple(places.shape)}")
    places = places.to(p.device)
    edges = torch.tensor(distance_edges(max(1, int(places.max()) + 1)), device=p.device)
    bins, count, kept = len(edges) - 1, 0 if spans is None else spans.shape[-1], min(top_k, p.m)
    found = Statistics(
        mass=zeros(p.m),
        entropy=zeros(p.n),
        peak=zeros(p.n),
        distance=zeros(bins),
        spans=zeros(p.n, count),
        rows=zeros(len(rows), p.m),
        top_keys=zeros(len(top), kept).long(),
        top_weights=zeros(len(top), kept),
    )
    at_rows, at_top = (torch.as_tensor(list(queries), dtype=torch.long) for queries in (rows, top))
    for part, w, spare in _weights(p, chosen, valid):
        keys = slice(0, w.shape[-1])
        found.entropy[:, :, part] = torch.special.entr(w, out=spare).sum(-1)
        w = w.float()
        found.mass[..., keys] += w.sum(2)
        found.peak[:, :, part] = w.amax(-1)
        found.distance += w.flatten(2) @ _bins(places[p.m - p.n :][part], places[keys], edges)
        if spans is not None:
            found.spans[:, :, part] = w @ spans[..., keys, :].to(w.dtype)
        inside = _inside(at_rows, part)
        found.rows[:, :, inside, keys] = w[:, :, at_rows[inside] - part.start]
        if len(inside := _inside(at_top, part)):
            best = w[:, :, at_top[inside] - part.start].topk(min(kept, w.shape[-1]))
            found.top_keys[:, :, inside, : best.indices.shape[-1]] = best.indices
            found.top_weights[:, :, inside, : best.indices.shape[-1]] = best.values
    return found


def _inside(queries: Tensor, part: slice) -> Tensor:
    """Which of the queries are in that part."""
    return ((queries >= part.start) & (queries < part.stop)).nonzero()[:, 0]


def _bins(of: Tensor, to: Tensor, edges: Tensor) -> Tensor:
    """(n·m, bins) floats: which bin the distance of each pair falls into, none where one of the two lies nowhere."""
    gap = (of[:, None] - to).abs().amax(-1)
    bin_of = torch.bucketize(gap, edges, right=True) - 1
    bin_of = bin_of.masked_fill((of.amin(-1) < 0)[:, None] | (to.amin(-1) < 0), -1)
    return (bin_of.reshape(-1, 1) == torch.arange(len(edges) - 1, device=of.device)).float()


def _weights(p: Problem, heads: list[int], valid: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(queries, their weights (B, H, n, m), spare memory of that shape), m being the keys that some of them see.

    All parts share the same two buffers: blocks of ever other sizes would leave the heap in pieces.
    """
    dtype = torch.promote_types(p.query.dtype, torch.float32)
    groups, query, key = p.groups, p.query, p.key
    if heads != list(range(p.heads)):
        groups, query, key = 1, query[:, heads], key[:, [head // groups for head in heads]]
    key = key.to(dtype).flatten(0, 1).contiguous()  # (B Hk, M, D)
    rows = p.batch * len(heads)
    chunk = min(p.n, max(1, _CHUNK_WEIGHTS // max(1, rows * p.m)))
    scores, shares = torch.empty(2, rows * chunk * p.m, dtype=dtype, device=p.device)
    for start in range(0, p.n, chunk):
        part = slice(start, min(start + chunk, p.n))
        n, m, allowed = part.stop - start, p.m, p.allowed(part)
        if allowed is not None:
            seen = allowed.flatten(0, -2).any(0).nonzero()
            m = min(p.m, _ROUND * (int(seen[-1]) // _ROUND + 1)) if len(seen) else 1
        s, w = (buffer[: rows * n * m].view(p.batch, len(heads), n, m) for buffer in (scores, shares))
        q = (query[:, :, part].to(dtype) * p.scale).reshape(-1, groups * n, query.shape[-1])
        torch.bmm(q, key[:, :m].mT, out=s.view(-1, groups * n, m))
        if (bias := p.bias_rows(part)) is not None:
            s += _of(bias, heads)[..., :m]
        if allowed is not None:
            s.masked_fill_(~_of(allowed, heads)[..., :m], -torch.inf)
        torch.softmax(s, -1, out=w)
        w.nan_to_num_(0.0)  # nan: a query that sees nothing
        if valid is not None:
            w *= valid[:, None, part, None]
        yield part, w, s


def _of(terms: Tensor, heads: list[int]) -> Tensor:
    """The heads of (B or 1, H or 1, n, M)."""
    return terms if terms.shape[1] == 1 else terms[:, heads]
