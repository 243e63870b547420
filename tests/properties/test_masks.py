"""The laws every mask obeys, for random expressions over all leaves."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from regard.masks import ALL, NONE, SOME, Mask
from tests.masks.naive import BATCH, HEADS, Case, cases, free_leaf, grid_leaf, grids, leaves

block_sizes = st.tuples(st.integers(1, 11), st.integers(1, 11)) | st.integers(1, 40).map(lambda b: (b, b))
# the builder's limits: as they are, made to refine even small matrices, and made to read off row by row
builders = st.sampled_from(
    [
        {"_CHUNK": 1 << 16},
        {"_ROOTS": 1, "_STRIPES": 1},
        {"_ROOTS": 16, "_STRIPES": 1, "_CHUNK": 7},
        {"_CELLS": 20, "_CHUNK": 7},
    ]
)


def dense(mask: Mask, n: int, m: int) -> Tensor:
    """``mask.dense`` with all four axes."""
    matrix = mask.dense(n, m)
    return matrix.reshape(mask.batch or 1, mask.heads or 1, n, m)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_dense_and_pointwise_calls_are_the_definition(case: Case) -> None:
    expected = case.dense()
    assert torch.equal(dense(case.mask, case.n, case.m), expected)
    index = torch.randint(0, 1 << 20, (4, 50), generator=torch.Generator().manual_seed(case.n))
    b, h, q, k = index % torch.tensor([case.mask.batch or 1, case.mask.heads or 1, case.n, case.m])[:, None]
    assert torch.equal(case.mask(b, h, q, k).expand(50), expected[b, h, q, k])


@given(cases(), block_sizes, builders)
@settings(max_examples=400, deadline=None)
def test_blocks_are_sound(case: Case, block: tuple[int, int], limits: dict[str, int]) -> None:
    with patch.multiple("regard.masks.build", **limits):
        kinds = case.mask.blocks(case.n, case.m, block).grid()
        decided = case.mask.blocks(case.n, case.m, block, exact=True).grid()
    true = case.kinds(block)
    assert ((kinds == SOME) | (kinds == true)).all()
    assert torch.equal(decided.int(), true)
    if case.mask.exact:
        assert torch.equal(kinds.int(), true)


@given(leaves(), block_sizes, builders)
@settings(max_examples=600, deadline=None)
def test_blocks_of_leaves_are_exact(case: Case, block: tuple[int, int], limits: dict[str, int]) -> None:
    with patch.multiple("regard.masks.build", **limits):
        structure = case.mask.blocks(case.n, case.m, block)
    if "from_function" not in repr(case.mask):
        assert case.mask.exact
        assert torch.equal(structure.grid().int(), case.kinds(block))


@given(leaves(), st.data())
@settings(max_examples=500, deadline=None)
def test_rectangles_of_leaves_are_exact_anywhere(case: Case, data: st.DataObject) -> None:
    q0 = data.draw(st.integers(0, case.n - 1))
    q1 = data.draw(st.integers(q0 + 1, case.n))
    k0 = data.draw(st.integers(0, case.m - 1))
    k1 = data.draw(st.integers(k0 + 1, case.m))
    some, every = case.mask.rect(*(torch.tensor([x]) for x in (q0, q1, k0, k1)))
    pairs = case.dense()[..., q0:q1, k0:k1].flatten(-2)
    shape = pairs.shape[:2]
    if case.mask.exact:
        assert torch.equal(some[..., 0].broadcast_to(shape), pairs.any(-1))
        assert torch.equal(every[..., 0].broadcast_to(shape), pairs.all(-1))


@given(grids, st.sampled_from([{"_LONG": 1 << 16}, {"_SHORT": 0}, {"_SHORT": 0, "_LONG": 0}]), st.data())
@settings(max_examples=150, deadline=None)
def test_all_rectangles_of_grids_are_exact(grid: tuple[int, ...], limits: dict[str, int], data: st.DataObject) -> None:
    kinds = ["neighborhood", "windows", "shifted_windows", "halo", "product"]
    mask, naive = data.draw(grid_leaf(grid, kinds))
    assume(mask.exact)
    case = Case(mask, naive, math.prod(grid), math.prod(grid))
    q0, q1, k0, k1 = some_rectangles(case)
    sums = torch.nn.functional.pad(case.dense()[0, 0].long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    allowed = sums[q1, k1] - sums[q0, k1] - sums[q1, k0] + sums[q0, k0]
    with patch.multiple("regard.masks.neighborhood", **limits):
        some, every = mask.rect(q0, q1, k0, k1)
    assert torch.equal(some, allowed > 0)
    assert torch.equal(every, allowed == (q1 - q0) * (k1 - k0))


@given(cases(), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_settled_rectangles_stay_mixed(case: Case, seed: int) -> None:
    check_settled(case, seed)


@given(st.integers(1, 16), st.integers(0, 999), st.data())
@settings(max_examples=200, deadline=None)
def test_settled_rectangles_of_periodic_leaves_stay_mixed(n: int, seed: int, data: st.DataObject) -> None:
    mask, naive = data.draw(free_leaf(n, n, ["strided", "dilated"]) | grid_leaf((n,), ["neighborhood"]))
    check_settled(Case(mask, naive, n, n), seed)


def check_settled(case: Case, seed: int) -> None:
    """Where a mask calls a rectangle settled, all its parts of the size or larger are "some, not all"."""
    generator = torch.Generator().manual_seed(seed)
    q0, q1, k0, k1 = parts = some_rectangles(case)
    outer = parts[:, torch.randint(parts.shape[1], (300,), generator=generator)]
    share = torch.rand(2, 300, generator=generator)
    height, width = ((outer[1::2] - outer[0::2]) * share).long() + 1
    within = (q0 >= outer[0, :, None]) & (q1 <= outer[1, :, None]) & (q1 - q0 >= height[:, None])
    within &= (k0 >= outer[2, :, None]) & (k1 <= outer[3, :, None]) & (k1 - k0 >= width[:, None])
    settled = case.mask.settled(*outer, height, width).broadcast_to(BATCH, HEADS, 300)
    some, every = case.mask.rect(*parts)
    decided = (every | ~some).broadcast_to(BATCH, HEADS, parts.shape[1])
    assert not (settled & (decided.float() @ within.float().T > 0)).any()


def some_rectangles(case: Case) -> Tensor:
    """(4, R): every rectangle of a small matrix, 20,000 of a larger one."""
    queries, keys = (torch.combinations(torch.arange(length + 1)) for length in (case.n, case.m))
    chosen = torch.arange(len(queries) * len(keys))
    if len(chosen) > 20_000:
        chosen = torch.randint(len(chosen), (20_000,), generator=torch.Generator().manual_seed(case.n))
    return torch.cat([queries[chosen // len(keys)], keys[chosen % len(keys)]], dim=1).T


@given(cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_shifted_mask_is_its_later_rows(case: Case, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, case.n - 1))
    rows = case.n - offset
    shifted = case.mask.shift(offset)
    expected = case.dense()[..., offset:, :]
    assert torch.equal(dense(shifted, rows, case.m), expected)
    kinds = shifted.blocks(rows, case.m, (3, 4)).grid()
    true = Case(shifted, lambda b, h, q, k: case.naive(b, h, q + offset, k), rows, case.m).kinds((3, 4))
    assert ((kinds == SOME) | (kinds == true)).all()


@given(cases(depth=2), st.data())
@settings(max_examples=100, deadline=None)
def test_boolean_laws(case: Case, data: st.DataObject) -> None:
    x = case.mask
    y = data.draw(st.sampled_from([x, ~x, Mask.shift(x, 0)]))
    n, m = case.n, case.m
    a, b = dense(x, n, m), dense(y, n, m)
    assert torch.equal(dense(~(x & y), n, m), dense(~x | ~y, n, m))
    assert torch.equal(dense(~(x | y), n, m), dense(~x & ~y, n, m))
    assert torch.equal(dense(x & y, n, m), a & b)
    assert torch.equal(dense(x | y, n, m), a | b)
    assert torch.equal(dense(~~x, n, m), a)


@given(cases(depth=2))
@settings(max_examples=200, deadline=None)
def test_density_counts_the_allowed_pairs(case: Case) -> None:
    assert case.mask.density(case.n, case.m) == pytest.approx(case.dense().double().mean().item(), abs=1e-12)


@given(cases(depth=2), block_sizes)
@settings(max_examples=100, deadline=None)
def test_structure_bounds_the_density(case: Case, block: tuple[int, int]) -> None:
    structure = case.mask.blocks(case.n, case.m, block)
    pairs = int(case.dense().sum())
    assert structure.pairs(ALL) <= pairs <= structure.pairs() == structure.pairs(SOME) + structure.pairs(ALL)
    grid, lists = structure.grid(), structure.lists()
    assert torch.equal(lists.count, (grid != NONE).sum(-1))
    rebuilt = torch.zeros_like(grid)
    for b, h, i in (grid != NONE).any(-1).nonzero().tolist():
        size = int(lists.count[b, h, i])
        index = lists.index[b, h, i, :size].long()
        assert (index.diff() > 0).all()
        rebuilt[b, h, i, index] = lists.kind[b, h, i, :size]
        assert (lists.kind[b, h, i, size:] == NONE).all()
        start, stop, kind = structure.row(i, b, h)
        assert (start < stop).all()
        assert ((stop[:-1] < start[1:]) | ((stop[:-1] == start[1:]) & (kind[:-1] != kind[1:]))).all()
    assert torch.equal(rebuilt, grid)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(cases(depth=2))
@settings(max_examples=30, deadline=None)
def test_flex_attention_gives_the_masked_softmax(case: Case) -> None:
    block_mask = case.mask.to_flex(case.n, case.m, 8)
    expected = case.dense().expand(BATCH, HEADS, -1, -1)
    # what the block lists say, without which an uncompiled flex_attention does its work
    kinds = torch.zeros(*block_mask.kv_indices.shape, dtype=torch.int)
    for kind, count, index in (
        (SOME, block_mask.kv_num_blocks, block_mask.kv_indices),
        (ALL, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        listed = torch.arange(index.shape[-1]) < count[..., None]
        kinds.scatter_add_(-1, index.long(), listed.int() * kind)
    ours = case.mask.blocks(case.n, case.m, 8).grid().int()
    ours[..., case.n // 8 :, :].clamp_(max=SOME)  # blocks that the lengths cut off are never full to FlexAttention
    ours[..., case.m // 8 :].clamp_(max=SOME)
    assert torch.equal(kinds, ours)

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, case.n, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, HEADS, case.m, 4, generator=generator, dtype=torch.float64)
    value = torch.randn(BATCH, HEADS, case.m, 4, generator=generator, dtype=torch.float64)
    scores = (query @ key.mT / 2).masked_fill(~expected, -torch.inf)
    out = flex_attention(query, key, value, block_mask=block_mask)
    assert torch.allclose(out, scores.softmax(-1).nan_to_num(0) @ value, atol=1e-12)
