"""Neighborhood attention against its definition on single tokens; its module; the tile simulator against counting."""

import itertools
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from regard import masks
from regard.attention import Partial
from regard.attention.grid import grid_attention
from regard.attention.grid_plan import Axis
from regard.errors import ArgumentError, MissingExtra, ShapeError, Unsupported
from regard.mechanisms.grid.neighborhood import (
    NeighborhoodAttention,
    neighborhood_attention,
    neighborhood_av,
    neighborhood_qk,
)
from regard.mechanisms.grid.tile_simulator import predict_ratio, search_strides, simulate_neighborhood

Settings = tuple[list[int], list[int], list[int], list[bool]]


def interval(i: int, length: int, window: int, dilation: int, stride: int, causal: bool) -> tuple[int, int]:
    """First visible position in the group of i, and one past the last."""
    p, group = i // dilation, i % dilation
    size = math.ceil((length - group) / dilation)
    if causal:
        leader = min(p // stride * stride + stride - 1, size - 1)
        return max(leader - window + 1, 0), p + 1
    leader = min(p // stride * stride + stride // 2, size - 1)
    start = min(max(leader - window // 2, 0), size - window)
    return start, start + window


def seen(i: int, length: int, window: int, dilation: int, stride: int, causal: bool) -> list[int]:
    """The keys of query i on one axis, from the definition."""
    start, end = interval(i, length, window, dilation, stride, causal)
    return [j for j in range(length) if j % dilation == i % dilation and start <= j // dilation < end]


def naive(q: Tensor, k: Tensor, v: Tensor, settings: Settings, rpb: Tensor | None = None) -> Partial:
    """Query by query, (B, *grid, H, D); key heads are shared by consecutive query heads."""
    grid, groups = q.shape[1:-2], q.shape[-2] // k.shape[-2]
    k, v = (t.repeat_interleave(groups, -2) for t in (k, v))
    out, lse = [], []
    for query in itertools.product(*(range(n) for n in grid)):
        lists = [seen(i, n, *axis) for i, n, *axis in zip(query, grid, *settings, strict=True)]
        keys = list(itertools.product(*lists))
        here = torch.stack([k[(slice(None), *key)] for key in keys], 1)
        values = torch.stack([v[(slice(None), *key)] for key in keys], 1)
        scores = torch.einsum("bhd,bmhd->bhm", q[(slice(None), *query)], here) * q.shape[-1] ** -0.5
        if rpb is not None:
            index = [
                [key[a] // gap - query[a] // gap + size - 1 for key in keys]
                for a, (size, gap) in enumerate(zip(settings[0], settings[1], strict=True))
            ]
            scores = scores + rpb[(slice(None), *index)]
        out.append(torch.einsum("bhm,bmhd->bhd", scores.softmax(-1), values))
        lse.append(scores.logsumexp(-1))
    return Partial(torch.stack(out, 1).view(*q.shape[:-1], v.shape[-1]), torch.stack(lse, 1).view(q.shape[:-1]))


def drawn(seed: int) -> tuple[list[int], Settings]:
    rng = random.Random(seed)
    axes = seed % 3 + 1
    grid = [rng.randint(3, (20, 7, 5)[axes - 1]) for _ in range(axes)]
    dilation = [rng.randint(1, 3) for _ in grid]
    window = [rng.randint(1, n // gap) for n, gap in zip(grid, dilation, strict=True)]
    stride = [rng.randint(1, size) for size in window]
    return grid, (window, dilation, stride, [rng.random() < 0.3 for _ in grid])


def inputs(grid: list[int], heads: int = 4, kv_heads: int = 2, dim: int = 3, value_dim: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return tuple(torch.randn(2, *grid, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("seed", range(15))
def test_any_setting_is_its_definition_forward_and_backward(seed: int) -> None:
    grid, settings = drawn(seed)
    q, k, v = inputs(grid)
    want = naive(q, k, v, settings)
    weights = torch.randn_like(want.out), torch.randn_like(want.lse)
    grads = torch.autograd.grad(want, (q, k, v), weights)
    for backend in ("tiles", "blocks", "auto"):
        got = neighborhood_attention(q, k, v, *settings, return_lse=True, backend=backend)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, (q, k, v), weights), grads)


@pytest.mark.parametrize("seed", range(12))
def test_no_size_of_tiles_changes_anything(seed: int) -> None:
    grid, settings = drawn(seed)
    q, k, v = inputs(grid)
    axes = [Axis(*each) for each in zip(grid, *settings, strict=True)]
    size = [random.Random(seed).randint(1, n + 2) for n in grid]
    got = grid_attention(q, k, v, axes, size=size)
    want = neighborhood_attention(q, k, v, *settings, backend="blocks")
    torch.testing.assert_close(got.out, want)
    weights = torch.randn_like(want)
    grads = (torch.autograd.grad(out, (q, k, v), weights) for out in (got.out, want))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("grid", [[9], [7, 8], [6, 4, 5]])
def test_biases_of_relative_positions(grid: list[int]) -> None:
    q, k, v = inputs(grid, 2, 2)
    settings: Settings = ([3, 3, 2][: len(grid)], [2, 1, 2][: len(grid)], [1] * len(grid), [False] * len(grid))
    rpb = torch.randn(2, *(2 * size - 1 for size in settings[0]), dtype=torch.float64, requires_grad=True)
    want = naive(q, k, v, settings, rpb)
    got = neighborhood_attention(q, k, v, *settings, rpb=rpb, return_lse=True)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want.out), torch.randn_like(want.lse)
    grads = (torch.autograd.grad(y, (q, k, v, rpb), weights) for y in (got, want))
    torch.testing.assert_close(*grads)


def test_gradients_with_everything_at_once() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    more = [torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rpb = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def f(*args: Tensor) -> Partial:
        q, k, v, keys, values, rpb = args
        extra = {"additional_keys": keys, "additional_values": values, "rpb": rpb}
        return neighborhood_attention(q, k, v, (2, 3), (2, 1), return_lse=True, **extra)

    assert torch.autograd.gradcheck(f, (q, k, v, *more, rpb))


@pytest.mark.parametrize("seed", range(6))
def test_two_steps_give_the_same(seed: int) -> None:
    grid, settings = drawn(seed)
    q, k, v = inputs(grid, 2, 2)
    more = [torch.randn(2, 3, 2, dim, dtype=torch.float64) for dim in (3, 5)]
    weights = neighborhood_qk(q, k, *settings, additional_keys=more[0]).softmax(-1)
    assert weights.shape == (2, *grid, 2, math.prod(settings[0]) + 3)
    got = neighborhood_av(weights, v, *settings, additional_values=more[1])
    extra = {"additional_keys": more[0], "additional_values": more[1]}
    torch.testing.assert_close(got, neighborhood_attention(q, k, v, *settings, **extra))


def test_special_cases() -> None:
    q, k, v = inputs([6, 4], 2, 2)
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    full = F.scaled_dot_product_attention(*flat).transpose(1, 2).view(2, 6, 4, 2, 5)
    torch.testing.assert_close(neighborhood_attention(q, k, v, (6, 4)), full)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 1), v)
    mask = masks.windows((6, 4), (3, 2)).dense(24)
    windows = F.scaled_dot_product_attention(*flat, mask).transpose(1, 2).view(2, 6, 4, 2, 5)
    torch.testing.assert_close(neighborhood_attention(q, k, v, (3, 2), stride=(3, 2)), windows)


def test_half_precision() -> None:
    q, k, v = (t.detach().bfloat16() for t in inputs([9, 10], dim=8, value_dim=8))
    got = neighborhood_attention(q, k, v, 5, 1)
    assert got.dtype == torch.bfloat16
    want = neighborhood_attention(*(t.float() for t in (q, k, v)), 5, 1)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, list | tuple) else (found,):
            if isinstance(t, Tensor):
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return found


def test_nothing_as_large_as_tokens_times_window_is_made() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, 64, 1, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        neighborhood_attention(q, k, v, 17).sum().backward()
    assert largest.most < 64 * 64 * 17 * 17 / 3


def test_it_compiles_and_exports_in_one_graph() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, (3, 5), (2, 1), rel_pos_bias=True)
    x = torch.randn(2, 7, 9, 8)
    want = layer(x)
    want.sum().backward()
    grad = layer.qkv.weight.grad.clone()
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    torch.testing.assert_close(layer.qkv.weight.grad, grad)
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), want)
    torch.testing.assert_close(layer(x), want)  # nothing that was traced is remembered


def test_the_module_takes_grids_of_any_rank_and_moves_with_them() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, 3, 2).double()
    for grid in ((11,), (8, 7), (6, 7, 6)):
        x = torch.randn(1, *grid, 8, dtype=torch.float64)
        assert layer(x).shape == x.shape
    x = torch.randn(1, 16, 14, 8, dtype=torch.float64)
    moved = layer(x.roll((2, 2), (1, 2)))  # by a multiple of the dilation: the same, away from the borders
    torch.testing.assert_close(moved[:, 6:-4, 6:-4], layer(x).roll((2, 2), (1, 2))[:, 6:-4, 6:-4])


@pytest.mark.parametrize("dilation", [2, 4])
def test_receptive_field_of_a_pair_of_layers(dilation: int) -> None:
    torch.manual_seed(0)
    near, far = NeighborhoodAttention(4, 1, 3, 1), NeighborhoodAttention(4, 1, 3, dilation)
    x = torch.randn(1, 31, 4, requires_grad=True)
    far(near(x))[0, 15].sum().backward()
    reached = x.grad[0].abs().amax(-1).nonzero().flatten()
    centres = {15 - dilation, 15, 15 + dilation}
    assert set(reached.tolist()) == {c + d for c in centres for d in (-1, 0, 1)}
    assert reached.max() - reached.min() + 1 == 1 + 2 * (1 + dilation)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kernel_size": 9}, ArgumentError, "kernel_size"),
        ({"kernel_size": 3, "dilation": 3}, ArgumentError, "dilation"),
        ({"kernel_size": 3, "stride": 4}, ArgumentError, "stride"),
        ({"kernel_size": 3, "is_causal": 1}, ArgumentError, "is_causal"),
        ({"kernel_size": (3, 3, 3)}, ArgumentError, "kernel_size"),
        ({"kernel_size": 3, "rpb": torch.zeros(2, 5, 5), "is_causal": True}, Unsupported, "rpb"),
        ({"kernel_size": 3, "rpb": torch.zeros(2, 5, 5), "backend": "blocks"}, Unsupported, "backend"),
        ({"kernel_size": 3, "rpb": torch.zeros(2, 3, 5)}, ShapeError, "rpb"),
        ({"kernel_size": 3, "backend": "fast"}, ArgumentError, "backend"),
        ({"kernel_size": 3, "additional_keys": torch.zeros(1, 2, 2, 4)}, ArgumentError, "additional_values"),
        ({"kernel_size": 3, "key": torch.zeros(1, 8, 6, 2, 4)}, ShapeError, "key"),
        ({"kernel_size": 3, "value": torch.zeros(1, 8, 8, 1, 4)}, ShapeError, "value"),
    ],
)
def test_refusals(kwargs: dict, error: type[Exception], message: str) -> None:
    given = {name: torch.zeros(1, 8, 8, 2, 4) for name in ("query", "key", "value")} | kwargs
    with pytest.raises(error, match=message):
        neighborhood_attention(**given)


def test_refusals_of_the_module() -> None:
    with pytest.raises(ArgumentError, match="axes"):
        NeighborhoodAttention(8, 2, (3, 3), (1, 1, 1))
    with pytest.raises(ShapeError, match="x"):
        NeighborhoodAttention(8, 2, (3, 3))(torch.zeros(1, 9, 8))


@pytest.mark.parametrize("seed", range(12))
def test_simulated_tiles_are_those_with_a_visible_pair(seed: int) -> None:
    grid, (window, dilation, stride, causal) = drawn(seed)
    rng = random.Random(seed)
    q_tile, kv_tile = ([rng.randint(1, 4) for _ in grid] for _ in range(2))
    pairs: dict[tuple, list[bool]] = {}
    tokens = list(itertools.product(*(range(n) for n in grid)))
    for q, k in itertools.product(tokens, repeat=2):
        if any(a % gap != b % gap for a, b, gap in zip(q, k, dilation, strict=True)):
            continue
        visible = all(
            b in seen(a, *axis) for a, b, *axis in zip(q, k, grid, window, dilation, stride, causal, strict=True)
        )
        tile = tuple(
            (a % gap, a // gap // tq, b // gap // tk)
            for a, b, gap, tq, tk in zip(q, k, dilation, q_tile, kv_tile, strict=True)
        )
        pairs.setdefault(tile, []).append(visible)
    visited = [tile for tile in pairs.values() if any(tile)]
    got = simulate_neighborhood(grid, window, stride, dilation, causal, q_tile=q_tile, kv_tile=kv_tile)
    assert got.visited == len(visited)
    assert got.masked == sum(not all(tile) for tile in visited)
    assert got.perfectly_block_sparse == all(all(tile) for tile in visited)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "q_tile", "kv_tile", "static", "dynamic", "flop"),
    [
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11, 11.11, 11.11),
        ((30, 48, 80), (18, 24, 24), 1, (4, 8, 8), (2, 8, 8), 5.245, 6.625, 11.11),
        ((256, 256), 80, 16, 16, (16, 8), 10.24, 10.24, 10.24),
        ((256, 256), 80, 1, 16, (16, 8), 7.06, 7.83, 10.24),
        ((16, 44, 80), (16, 24, 16), (16, 8, 8), (4, 8, 8), (2, 8, 8), 6.43, 10.0, 9.17),
        ((16, 16), 8, 4, 4, 4, 2.56, 4.0, 4.0),
    ],
)
def test_reference_speedups(grid, window, stride, q_tile, kv_tile, static, dynamic, flop) -> None:
    for tiling, want in (("static", static), ("dynamic", dynamic)):
        got = simulate_neighborhood(grid, window, stride, q_tile=q_tile, kv_tile=kv_tile, kv_tiling=tiling)
        assert got.speedup_bound == pytest.approx(want, abs=6e-3)
        assert got.flop_bound == pytest.approx(flop, abs=6e-3)


def test_flat_tiles_are_blocks_of_the_mask() -> None:
    got = simulate_neighborhood((8, 8), 3, q_tile=(2, 4), kv_tile=(2, 4), kv_tiling="flat")
    dense = masks.neighborhood((8, 8), 3).dense(64).view(8, 8, 8, 8).transpose(1, 2).flatten(2)
    assert got.visited == dense.any(-1).sum()
    assert got.masked == (dense.any(-1) & ~dense.all(-1)).sum()
    with pytest.raises(ArgumentError, match="kv_tiling"):
        simulate_neighborhood((8, 8), 3, q_tile=2, kv_tile=2, kv_tiling="round")


def test_strides_are_ranked() -> None:
    found = search_strides((16, 16), 8, 4, 4, 4, kv_tiling="dynamic")
    assert len(found) == 16
    assert found[0][0] == (4, 4)
    bounds = [count.speedup_bound for _, count in found]
    assert bounds == sorted(bounds, reverse=True)
    assert found[0][1].perfectly_block_sparse


def test_natten_gets_its_own_arguments(monkeypatch) -> None:
    """A stand-in for the package: what it would be called with, and that its answer is passed on."""
    called = {}

    def na2d(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
        called.update(arguments, heads=k.shape[-2])
        return q + 1, q[..., 0]

    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=na2d))
    q, k, v = torch.randn(1, 6, 8, 4, 5), torch.randn(1, 6, 8, 2, 5), torch.randn(1, 6, 8, 2, 5)
    found = neighborhood_attention(
        q, k, v, (3, 4), (2, 1), (1, 2), (False, True), 0.3, return_lse=True, backend="natten"
    )
    assert called == {
        "kernel_size": (3, 4),
        "stride": (1, 2),
        "dilation": (2, 1),
        "is_causal": (False, True),
        "scale": 0.3,
        "return_lse": True,
        "heads": 4,
    }
    assert found.out.equal(q + 1)
    assert found.lse.equal(q[..., 0])


def test_natten_is_asked_for_by_name(monkeypatch) -> None:
    q = torch.randn(1, 5, 5, 2, 4)
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(MissingExtra, match="natten is needed"):
        neighborhood_attention(q, q, q, 3, backend="natten")
    with pytest.raises(Unsupported, match="'natten' takes no rpb"):
        neighborhood_attention(q, q, q, 3, rpb=torch.zeros(2, 5, 5), backend="natten")


def test_predicted_times_are_those_of_the_tiles_that_run() -> None:
    everything = predict_ratio((64, 64), 64)
    assert 1 <= everything < 1.3  # dense attention itself, in one tile
    aligned, sliding = predict_ratio((64, 64), 16, 16), predict_ratio((64, 64), 16)
    bound = simulate_neighborhood((64, 64), 16, 16, q_tile=16, kv_tile=16)
    assert bound.perfectly_block_sparse
    assert 1 / bound.speedup_bound < aligned < sliding < everything
    with pytest.raises(ArgumentError, match="window_size"):
        predict_ratio((4, 4), 5)
