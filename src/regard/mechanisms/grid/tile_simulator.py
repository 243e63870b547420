"""What a block kernel visits under neighborhood attention, and so how much faster than dense attention it can be.

The simulator of generalized neighborhood attention (arXiv:2504.16922), which was announced and not released. A kernel
works on tiles of queries times tiles of keys; a window that does not fall on tile borders makes it visit more than the
window holds, and compute masks. Strides that keep a tile's queries on one window avoid both. Counted, not measured:
``speedup_bound`` is what remains if everything but visited tiles costs nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from regard import masks
from regard.attention.grid_plan import Axis, cost, extent, group_sizes, stopping, tile_size
from regard.errors import ArgumentError
from regard.masks.grid import grid_shape, per_axis
from regard.masks.neighborhood import neighborhood_axes

_KV_TILINGS = ("static", "dynamic", "flat")
_TILED = 1.2  # pairs of dense attention that one in a tile takes: 31 of 32 measured cases are within 25 % of it


@dataclass(frozen=True)
class TileCount:
    """The outcome of a simulation.

    Attributes:
        visited: pairs of a query tile and a key tile that are computed.
        baseline: the same for dense attention.
        masked: visited pairs in which some keys are hidden from some queries.
        flop_bound: N / window, the speed-up if only visible pairs were computed.
    """

    visited: int
    baseline: int
    masked: int
    flop_bound: float

    @property
    def speedup_bound(self) -> float:
        """Dense tiles per visited tile."""
        return self.baseline / self.visited

    @property
    def masked_fraction(self) -> float:
        """The share of visited tiles that need a mask inside."""
        return self.masked / self.visited

    @property
    def perfectly_block_sparse(self) -> bool:
        """Whether no visited tile needs a mask."""
        return self.masked == 0


def simulate_neighborhood(
    grid: Sequence[int],
    window_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    q_tile: int | Sequence[int],
    kv_tile: int | Sequence[int],
    kv_tiling: str = "static",
) -> TileCount:
    """Count the tiles that a kernel visits.

    Args:
        grid, window_size, stride, dilation, is_causal: as in `regard.masks.neighborhood`.
        q_tile, kv_tile: tokens per tile, one number or one per axis.
        kv_tiling: "static": key tiles stand at multiples of their size, as in the published kernels; "dynamic": they
            start at each query tile's first key; "flat": tiles are runs of tokens in row-major order, as a kernel for
            sequences has them (Π q_tile and Π kv_tile tokens long).

    Raises:
        ArgumentError: as `regard.masks.neighborhood`, or another tiling.
    """
    shape = grid_shape(grid)
    window = neighborhood_axes(shape, window_size, dilation, stride, is_causal, window_name="window_size")
    queries, keys = per_axis("q_tile", q_tile, shape, 1), per_axis("kv_tile", kv_tile, shape, 1)
    if kv_tiling not in _KV_TILINGS:
        raise ArgumentError(f"kv_tiling: expected one of {', '.join(_KV_TILINGS)}, got {kv_tiling!r}")
    baseline = math.prod(-(-n // t) for size in (queries, keys) for n, t in zip(shape, size, strict=True))
    flop_bound = math.prod(shape) / math.prod(axis.window for axis in window)
    if kv_tiling == "flat":
        n, bq, bk = math.prod(shape), math.prod(queries), math.prod(keys)
        kind = masks.neighborhood(shape, window_size, dilation, stride, is_causal).blocks(n, n, (bq, bk)).cells()[2]
        return TileCount(len(kind), -(-n // bq) * -(-n // bk), int((kind == masks.SOME).sum()), flop_bound)
    counts = [
        _count(axis, tq, tk, kv_tiling == "dynamic")
        for axis, tq, tk in zip(stopping(window), queries, keys, strict=True)
    ]
    visited, whole = (math.prod(each) for each in zip(*counts, strict=True))
    return TileCount(visited, baseline, visited - whole, flop_bound)


def predict_ratio(
    grid: Sequence[int],
    window_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    heads: int = 8,
) -> float:
    """Time of `neighborhood_attention` in tiles over that of dense attention among all tokens, forward, on a CPU.

    Unlike `simulate_neighborhood` it knows what regard does: which tiles it chooses, and what gathering keys, small
    tiles and calls of the kernel cost (`regard.attention.grid_plan.cost`). ``benchmarks/neighborhood.py`` holds it
    against measurements.

    Args:
        grid, window_size, stride, dilation, is_causal: as in `regard.masks.neighborhood`.
        heads: of all batch items together.
    """
    shape = grid_shape(grid)
    window = neighborhood_axes(shape, window_size, dilation, stride, is_causal, window_name="window_size")
    axes = stopping(window)
    extents = [extent(axis, size) for axis, size in zip(axes, tile_size(axes, heads), strict=True)]
    return _TILED * cost(extents, heads) / (heads * math.prod(shape) ** 2)


def search_strides(
    grid: Sequence[int],
    window_size: int | Sequence[int],
    q_tile: int | Sequence[int],
    kv_tile: int | Sequence[int],
    max_stride: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    kv_tiling: str = "static",
) -> list[tuple[tuple[int, ...], TileCount]]:
    """All strides up to ``max_stride`` (the window by default), those with the highest speed-up first.

    Of equally fast ones the smaller strides come first: they are nearer to a sliding window.
    """
    shape = grid_shape(grid)
    windows = per_axis("window_size", window_size, shape, 1)
    most = windows if max_stride is None else per_axis("max_stride", max_stride, shape, 1)
    found = []
    for stride in product(*(range(1, min(each) + 1) for each in zip(windows, most, strict=True))):
        count = simulate_neighborhood(
            shape, windows, stride, dilation, is_causal, q_tile=q_tile, kv_tile=kv_tile, kv_tiling=kv_tiling
        )
        found.append((stride, count))
    return sorted(found, key=lambda each: (-each[1].speedup_bound, math.prod(each[0])))


def _count(axis: Axis, q_tile: int, kv_tile: int, dynamic: bool) -> tuple[int, int]:
    """(visited tiles, those in which everything is visible) along one axis."""
    visited = whole = 0
    for size in group_sizes(axis, axis.length):
        first = np.arange(0, size, q_tile)
        last = np.minimum(first + q_tile, size) - 1
        low, least = axis.bounds(first, size)
        most, high = axis.bounds(last, size)
        origin = low if dynamic else low // kv_tile * kv_tile
        tiles = -(-(high - origin) // kv_tile)
        for tile in range(int(tiles.max())):
            start = origin + tile * kv_tile
            end = np.minimum(start + kv_tile, high if dynamic else size)
            visited += int((tile < tiles).sum())
            whole += int(((tile < tiles) & (most <= start) & (end <= least)).sum())
    return visited, whole
