"""VMoBA: mixture of block attention for video, with blocks in one, two or three dimensions by turns."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.mechanisms.base import Mechanism, Pattern

Grid = tuple[int, int, int]
Chunk = int | float | Sequence[int]

SELECTIONS = ("threshold", "topk")
#: which entries (b)atch, (c)hunk, (h)ead, que(n) compete; the published ones span the batch where they span queries
SCOPES = {
    "query_head": "b c h n -> (b h n) c",
    "block": "b c h n -> (b c) (h n)",
    "head_global": "b c h n -> (b h) (c n)",
    "overall": "b c h n -> b (c h n)",
}
BATCH_SCOPES = {**SCOPES, "head_global": "b c h n -> h (b c n)", "overall": "b c h n -> 1 (b c h n)"}


class VideoBlockAttention(Mechanism):
    """Each query attends to its own block and to the blocks chosen for it (VMoBA, arXiv:2506.23858).

        g[c, h, s] = mean(k of block c)_h · q[s, h]                                gate, without scale
        y[s, h] = softmax over own block ∪ {c chosen for (s, h)} of (q kᵀ / √D) v    one joint softmax

    x (B, T·H·W, C), tokens of a video in raster order, to the same. Layer l cuts blocks by its turn in ``chunks``: c
    frames, (h, w) tiles through all frames, or (t, h, w) boxes. "threshold" keeps, in each scope, the best of the other
    blocks until own and kept ones have ``threshold`` of the gate's mass (scaled to 0..1 in the scope); "topk" keeps
    ``topk`` per query on average. Exact attention over what is chosen; the choice itself has no gradient.

    Args:
        dim: C.
        num_heads: H, with head_dim D = C / H.
        grid: (T, H, W) of the tokens.
        chunks: block sizes by turns of the layers, see above.
        layer_idx: which turn this layer has.
        select: "threshold" or "topk".
        scope: where blocks compete: "query_head" for each query and head, "block" for each block among all queries,
            "head_global" for each head among all queries and blocks (the paper's), "overall" among everything.
        threshold, topk: how much is kept.
        bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    cost: ClassVar[str] = "O(ρ N² C + N blocks C) for a kept share ρ of the pairs"
    example: ClassVar[dict[str, Any]] = {"grid": (4, 5, 5), "chunks": (1, (5, 5), (2, 5, 5))}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid: Grid = (4, 8, 8),
        chunks: Sequence[Chunk] = (1, (4, 4), (2, 4, 4)),
        layer_idx: int = 0,
        select: str = "threshold",
        scope: str = "head_global",
        threshold: float = 0.25,
        topk: int = 3,
        bias: bool = True,
    ):
        super().__init__()
        per_head(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, False
        self.grid: Grid = (grid[0], grid[1], grid[2])
        self.chunk = chunks[layer_idx % len(chunks)]
        block_size(self.grid, self.chunk)
        self.choice: dict[str, Any] = {"select": select, "scope": scope, "threshold": threshold, "topk": topk}
        _check_choice(select, scope, threshold, topk)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        if valid is not None and not bool(valid.all()):
            raise ArgumentError("valid: a video has no padding; expected all True")
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = vmoba_attention(q, k, v, self.grid, self.chunk, **self.choice)
        return self.o_proj(merge_heads(out))


def vmoba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    chunk: Chunk,
    *,
    select: str = "threshold",
    scope: str = "head_global",
    threshold: float = 0.25,
    topk: int = 3,
    across_batch: bool = False,
    scale: float | None = None,
) -> Tensor:
    """q, k, v (B, H, N, D) of the tokens of a grid to (B, H, N, D); see `VideoBlockAttention`.

    ``across_batch`` lets the items of a batch compete in the scopes "head_global" and "overall", as published; by
    default each has its own budget, so that an item's result does not depend on its neighbours.

    Raises:
        ShapeError: N is not the number of tokens in the grid.
        ArgumentError: blocks do not divide the grid, or an unknown choice.
    """
    _check_choice(select, scope, threshold, topk)
    size = block_size(grid, chunk)
    if q.shape[2] != math.prod(grid):
        raise ShapeError(f"q: expected {math.prod(grid)} tokens for the grid {grid}, got {tuple(q.shape)}")
    q, k, v = (partition(t, grid, chunk) for t in (q, k, v))
    kept = choose(q.detach(), k.detach(), size, select, scope, threshold, topk, across_batch)
    out = attention(q, k, v, mask=None if kept is None else masks.from_blocks(kept, (1, size)), scale=scale)
    return unpartition(out, grid, chunk)


def choose(
    q: Tensor, k: Tensor, size: int, select: str, scope: str, threshold: float, topk: int, across_batch: bool = False
) -> Tensor | None:
    """Which blocks of ``size`` consecutive keys each query attends to: (B, H, N, blocks) bool.

    None means all: the published code attends fully where nothing but each query's own block is chosen.
    """
    n = q.shape[2]
    means = torch.stack([block.mean(2) for block in k.float().split(size, dim=2)], 1)  # (B, blocks, H, D)
    gate = torch.einsum("bchd,bhnd->bchn", means, q.float())
    own = torch.arange(n, device=q.device) // size == torch.arange(gate.shape[1], device=q.device)[:, None]
    own = own[None, :, None, :].expand_as(gate)
    kept = select_blocks(gate, own, select, scope, threshold, topk, across_batch)
    if not bool((kept & ~own).any()):
        return None
    return rearrange(kept | own, "b c h n -> b h n c")


def select_blocks(
    gate: Tensor, own: Tensor, select: str, scope: str, threshold: float, topk: int, across_batch: bool = False
) -> Tensor:
    """The choice itself: gate and own-block mask (B, blocks, H, N) to (B, blocks, H, N) bool, own blocks included."""
    pattern = (BATCH_SCOPES if across_batch else SCOPES)[scope]
    scores, self_ = rearrange(gate, pattern), rearrange(own, pattern)
    if select == "topk":
        per_scope = topk * (scores.shape[1] // gate.shape[1])  # for each query and head that compete
        index = scores.masked_fill(self_, torch.inf).topk(min(per_scope, scores.shape[1]), dim=1).indices
        kept = torch.zeros_like(self_).scatter_(1, index, True)
    else:
        kept = _until(scores, self_, threshold)
    kept = kept | self_
    back, front = pattern.split(" -> ")
    sizes = dict(zip("bchn", gate.shape, strict=True))
    return rearrange(kept, f"{front} -> {back}", **sizes)


def _until(scores: Tensor, own: Tensor, threshold: float, eps: float = 1e-6) -> Tensor:
    """Per row: the largest entries that are not ``own`` until they and ``own`` hold ``threshold`` of the row's mass."""
    if threshold == 1:  # whatever rounding says
        return torch.ones_like(own)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    spread = torch.where(high - low <= eps, 1.0, high - low)
    mass = (scores - low) / spread
    total = mass.sum(1, keepdim=True) + eps
    need = (threshold - (mass * own).sum(1, keepdim=True) / total).clamp(min=0.0)
    ranked, index = mass.masked_fill(own, 0.0).sort(dim=1, descending=True, stable=True)
    enough = ranked.cumsum(1) / total >= need
    # the first rank that is enough is kept too, so at least one block besides the own one
    ranks = (~enough).long().cumprod(1)
    kept = torch.cat([torch.ones_like(ranks[:, :1]), ranks[:, :-1]], 1).bool()
    return torch.zeros_like(own).scatter_(1, index, kept)


def block_size(grid: Grid, chunk: Chunk) -> int:
    """Tokens per block.

    Raises:
        ArgumentError: the blocks do not divide the grid.
    """
    t, h, w = grid
    if isinstance(chunk, (int, float)):
        if chunk <= 0 or int(chunk * h * w) < 1:
            raise ArgumentError(f"chunks: expected a positive number of frames, got {chunk}")
        return int(chunk * h * w)
    sizes = tuple(chunk)
    over = {2: (h, w), 3: (t, h, w)}.get(len(sizes))
    if over is None or any(s < 1 or g % s for g, s in zip(over, sizes, strict=True)):
        raise ArgumentError(f"chunks: expected frames, or (h, w) or (t, h, w) that divide the grid {grid}, got {chunk}")
    return math.prod(sizes) * (t if len(sizes) == 2 else 1)


def partition(x: Tensor, grid: Grid, chunk: Chunk) -> Tensor:
    """Raster order to blocks one after the other; x (B, H, N, D)."""
    pattern, sizes = _pattern(grid, chunk)
    return x if pattern is None else rearrange(x, "b n {} d -> b n {} d".format(*pattern), **sizes)


def unpartition(x: Tensor, grid: Grid, chunk: Chunk) -> Tensor:
    """The inverse of `partition`."""
    pattern, sizes = _pattern(grid, chunk)
    return x if pattern is None else rearrange(x, "b n {1} d -> b n {0} d".format(*pattern), **sizes)


def _pattern(grid: Grid, chunk: Chunk) -> tuple[tuple[str, str] | None, dict[str, int]]:
    if isinstance(chunk, (int, float)):
        return None, {}  # whole frames are consecutive already
    ct, ch, cw = (grid[0], *chunk) if len(chunk) == 2 else chunk
    sizes = {"ct": ct, "ch": ch, "cw": cw, "nt": grid[0] // ct, "nh": grid[1] // ch, "nw": grid[2] // cw}
    return ("(nt ct nh ch nw cw)", "(nt nh nw ct ch cw)"), sizes


def _check_choice(select: str, scope: str, threshold: float, topk: int) -> None:
    for name, value, known in (("select", select, SELECTIONS), ("scope", scope, SCOPES)):
        if value not in known:
            raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if select == "topk" and scope == "block":
        raise ArgumentError("scope: 'block' goes with select='threshold' only")
    if not 0 <= threshold <= 1:
        raise ArgumentError(f"threshold: expected a share from 0 to 1, got {threshold}")
    if topk < 1:
        raise ArgumentError(f"topk: expected at least 1, got {topk}")
