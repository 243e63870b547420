"""Every mask leaf a second time: plain Python on single numbers, written from the definitions.

`cases` draws random expressions over all leaves together with their naive meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor

from regard import masks
from regard.masks import Mask

Naive = Callable[[int, int, int, int], bool]
BATCH, HEADS = 2, 3
LEAVES = [
    *("full", "empty", "causal", "sliding_window", "one_sided", "band", "dilated", "strided", "sinks", "prefix"),
    *("blockwise_causal", "power", "per_head", "from_dense", "from_blocks", "from_lists", "random_blocks"),
    *("padding", "groups", "from_function"),
]
GRID_LEAVES = ["documents", "ids", "neighborhood", "neighborhood", "windows", "shifted_windows", "halo", "product"]


@dataclass
class Case:
    """A mask, what it means, and the lengths it is used at."""

    mask: Mask
    naive: Naive
    n: int
    m: int

    def dense(self) -> Tensor:
        """The naive meaning as (batch or 1, heads or 1, n, m)."""
        return torch.tensor(
            [
                [
                    [[self.naive(b, h, q, k) for k in range(self.m)] for q in range(self.n)]
                    for h in range(self.mask.heads or 1)
                ]
                for b in range(self.mask.batch or 1)
            ]
        )

    def kinds(self, block: tuple[int, int]) -> Tensor:
        """(batch or 1, heads or 1, query blocks, key blocks): the true kind of every block."""
        dense, (bq, bk) = self.dense(), block
        rows = []
        for rows_of_pairs in dense.split(bq, dim=-2):
            blocks = [pairs.flatten(-2) for pairs in rows_of_pairs.split(bk, dim=-1)]
            rows.append(torch.stack([x.any(-1).int() + x.all(-1).int() for x in blocks], dim=-1))
        return torch.stack(rows, dim=-2)


def power_of_two(x: int) -> bool:
    return x > 0 and x.bit_count() == 1


def coordinates(grid: tuple[int, ...], token: int) -> list[int]:
    out = []
    for axis in range(len(grid)):
        inner = math.prod(grid[axis + 1 :])
        out.append(token // inner)
        token -= out[-1] * inner
    return out


def neighbors(length: int, window: int, dilation: int, stride: int, causal: bool, query: int) -> list[int]:
    """The keys of one axis that a query sees, listed."""
    group = [i for i in range(length) if i % dilation == query % dilation]
    p = group.index(query)
    stride_group = [x for x in range(p - p % stride, p - p % stride + stride) if x < len(group)]
    if causal:
        leader = stride_group[-1]
        return [group[x] for x in range(leader - window + 1, p + 1) if x >= 0]
    middle = p - p % stride + stride // 2
    leader = min(middle, len(group) - 1)
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window > len(group):
        first -= 1
    return [group[x] for x in range(first, first + window)]


def swin_label(size: int, window: int, shift: int, i: int) -> tuple[int, int]:
    """Window and region label of a coordinate, the way Swin computes them: pad, roll, cut, label."""
    padded = -(-size // window) * window
    rolled = (i - shift) % padded
    region = 0 if rolled < padded - window else 1 if rolled < padded - shift else 2
    return rolled // window, region


grids = (
    st.tuples(st.integers(1, 24))
    | st.tuples(st.integers(1, 6), st.integers(1, 6))
    | st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
)


@st.composite
def free_leaf(draw: st.DrawFn, n: int, m: int, kinds: Sequence[str] = LEAVES) -> tuple[Mask, Naive]:
    """A leaf that fits any lengths, or is made for these."""
    small = st.integers(1, max(n, m) + 2)
    kind = draw(st.sampled_from(kinds))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.1, 0.5, 0.9]))

    def flags(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=seed) < share

    match kind:
        case "full":
            return masks.full(), lambda b, h, q, k: True
        case "empty":
            return masks.empty(), lambda b, h, q, k: False
        case "causal":
            return masks.causal(), lambda b, h, q, k: k <= q
        case "sliding_window":
            w = draw(small)
            return masks.sliding_window(w), lambda b, h, q, k: abs(q - k) < w
        case "one_sided":
            w = draw(small)
            return masks.sliding_window(w, causal=True), lambda b, h, q, k: 0 <= q - k < w
        case "band":
            least = draw(st.integers(-m, n))
            most = least + draw(small)
            return masks.band(least, most), lambda b, h, q, k: least <= q - k <= most
        case "dilated":
            w, d = draw(st.integers(1, 5)), draw(st.integers(1, 7))
            seen = {d * j for j in range(1 - w, w)}
            return masks.dilated(w, d), lambda b, h, q, k: q - k in seen
        case "strided":
            s = draw(small)
            return masks.strided(s), lambda b, h, q, k: (q - k) % s == 0
        case "sinks":
            s = draw(st.integers(0, m + 1))
            return masks.sinks(s), lambda b, h, q, k: k < s
        case "prefix":
            p = draw(st.integers(0, m + 1))
            return masks.prefix(p), lambda b, h, q, k: k <= q or k < p
        case "blockwise_causal":
            s = draw(small)
            return masks.blockwise_causal(s), lambda b, h, q, k: k < (q // s + 1) * s
        case "power":
            block, window, sinks = draw(st.integers(1, 4)), draw(st.integers(0, 9)), draw(st.integers(0, 3))
            causal = draw(st.booleans())

            def allowed(b: int, h: int, q: int, k: int) -> bool:
                d = q // block - k // block
                if causal and k > q:
                    return False
                return d == 0 or power_of_two(abs(d)) or abs(d) < window or k // block < sinks

            return masks.power(block, window, sinks, causal), allowed
        case "per_head":
            parts = [draw(free_leaf(n, m).filter(lambda part: part[0].heads is None)) for _ in range(HEADS)]
            return masks.per_head([x for x, _ in parts]), lambda b, h, q, k: parts[h][1](b, h, q, k)
        case "from_dense":
            table = flags(*draw(st.sampled_from([(), (HEADS,), (BATCH, HEADS), (BATCH, 1)])), n, m)
            listed = table.expand(BATCH, HEADS, n, m).tolist()
            return masks.from_dense(table), lambda b, h, q, k: listed[b][h][q][k]
        case "from_blocks":
            bq, bk = draw(st.integers(1, 9)), draw(st.integers(1, 9))
            lead = draw(st.sampled_from([(), (HEADS,), (BATCH, HEADS), (BATCH, 1)]))
            table = flags(*lead, -(-n // bq), -(-m // bk))
            listed = table.expand(BATCH, HEADS, -1, -1).tolist()
            return masks.from_blocks(table, (bq, bk)), lambda b, h, q, k: listed[b][h][q // bq][k // bk]
        case "from_lists":
            block = draw(st.integers(1, 9))
            columns = -(-m // block)
            index = torch.randint(-1, columns, (HEADS, -(-n // block), 3), generator=seed)
            chosen = index.tolist()
            return masks.from_lists(index, columns, block), lambda b, h, q, k: k // block in chosen[h][q // block]
        case "random_blocks":
            block = draw(st.integers(1, 9))
            mask = masks.random_blocks(n, m, block, density=share, seed=draw(st.integers(0, 99)), heads=HEADS)
            listed = mask.dense(n, m).tolist()  # drawn at random: only its use has a second definition
            return mask, lambda b, h, q, k: listed[h][q // block * block][k // block * block]
        case "padding":
            valid = flags(BATCH, m)
            listed = valid.tolist()
            return masks.padding(valid), lambda b, h, q, k: listed[b][k]
        case "groups":
            batch = draw(st.sampled_from([1, BATCH]))
            ids = torch.randint(0, 4, (batch, n), generator=seed)
            key_ids = torch.randint(0, 3, (batch, m), generator=seed)
            relation = flags(4, 3)
            of, key_of, may = ids.expand(BATCH, n).tolist(), key_ids.expand(BATCH, m).tolist(), relation.tolist()
            return masks.groups(ids, relation, key_ids), lambda b, h, q, k: may[of[b][q]][key_of[b][k]]
        case "from_function":
            mask = masks.from_function(lambda b, h, q, k: (q * 5 + k * 3) % 7 < 3 + h, heads=HEADS)
            return mask, lambda b, h, q, k: (q * 5 + k * 3) % 7 < 3 + h
    raise AssertionError(kind)


@st.composite
def grid_leaf(draw: st.DrawFn, grid: tuple[int, ...], kinds: Sequence[str] = GRID_LEAVES) -> tuple[Mask, Naive]:
    """A leaf on a token grid, or on as many tokens."""
    n = math.prod(grid)
    axes = range(len(grid))

    def each(*bounds: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(bounds[0], bounds[1])) for _ in axes)

    def on_grid(axis_allows: Callable[[int, int, int], bool]) -> Naive:
        return lambda b, h, q, k: all(
            axis_allows(a, x, y) for a, x, y in zip(axes, coordinates(grid, q), coordinates(grid, k), strict=True)
        )

    match draw(st.sampled_from(kinds)):
        case "documents":
            cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6)))
            lengths = [y - x for x, y in zip([0, *cuts], [*cuts, n], strict=True)]
            ends = list(accumulate(lengths))
            return masks.documents(lengths), lambda b, h, q, k: all((q < e) == (k < e) for e in ends)
        case "ids":
            ids = [sorted(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))) for _ in range(BATCH)]
            return masks.documents(ids=torch.tensor(ids)), lambda b, h, q, k: ids[b][q] == ids[b][k]
        case "neighborhood":
            dilation = tuple(draw(st.integers(1, min(size, 4))) for size in grid)
            window = tuple(draw(st.integers(1, size // gap)) for size, gap in zip(grid, dilation, strict=True))
            stride = tuple(draw(st.integers(1, w)) for w in window)
            causal = tuple(draw(st.booleans()) for _ in axes)
            each_axis = zip(grid, window, dilation, stride, causal, strict=True)
            seen = [[neighbors(*axis, q) for q in range(axis[0])] for axis in each_axis]
            return masks.neighborhood(grid, window, dilation, stride, causal), on_grid(lambda a, x, y: y in seen[a][x])
        case "windows":
            window = each(1, 5)
            return masks.windows(grid, window), on_grid(lambda a, x, y: x // window[a] == y // window[a])
        case "shifted_windows":
            window = each(1, 5)
            shift = tuple(draw(st.integers(0, w - 1)) for w in window)
            label = [[swin_label(*axis, i) for i in range(axis[0])] for axis in zip(grid, window, shift, strict=True)]
            mask = masks.shifted_windows(grid, window, shift)
            return mask, on_grid(lambda a, x, y: label[a][x] == label[a][y])
        case "halo":
            block, width = each(1, 5), each(0, 3)
            return masks.halo(grid, block, width), on_grid(
                lambda a, x, y: x // block[a] * block[a] - width[a] <= y < (x // block[a] + 1) * block[a] + width[a]
            )
        case "product":
            parts = [draw(free_leaf(size, size).filter(_plain)) for size in grid]
            return masks.product(grid, [x for x, _ in parts]), on_grid(lambda a, x, y: parts[a][1](0, 0, x, y))
    raise AssertionError


@st.composite
def leaves(draw: st.DrawFn) -> Case:
    """One leaf and lengths that fit it."""
    return draw(_cases(st.just(0)))


@st.composite
def cases(draw: st.DrawFn, depth: int = 3) -> Case:
    """A random expression over all leaves."""
    return draw(_cases(st.integers(0, depth)))


@st.composite
def _cases(draw: st.DrawFn, depths: st.SearchStrategy[int]) -> Case:
    grid = draw(grids)
    n = math.prod(grid)
    m = n if draw(st.booleans()) else draw(st.integers(1, 24))
    leaf = free_leaf(n, m) | grid_leaf(grid) if m == n else free_leaf(n, m)
    mask, naive = draw(_expression(leaf, draw(depths)))
    return Case(mask, naive, n, m)


@st.composite
def _expression(draw: st.DrawFn, leaf: st.SearchStrategy[tuple[Mask, Naive]], depth: int) -> tuple[Mask, Naive]:
    if depth == 0:
        return draw(leaf)
    x, f = draw(_expression(leaf, depth - 1))
    match draw(st.sampled_from("&|~")):
        case "~":
            return ~x, lambda b, h, q, k: not f(b, h, q, k)
        case "&":
            y, g = draw(_expression(leaf, depth - 1))
            return x & y, lambda b, h, q, k: f(b, h, q, k) and g(b, h, q, k)
        case _:
            y, g = draw(_expression(leaf, depth - 1))
            return x | y, lambda b, h, q, k: f(b, h, q, k) or g(b, h, q, k)


def _plain(part: tuple[Mask, Naive]) -> bool:
    return part[0].heads is None and part[0].batch is None
