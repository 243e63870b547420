"""Dynamic mask attention against its equations in plain loops."""

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms import state_bytes
from regard.mechanisms.sparse import dynamic_mask as file
from regard.mechanisms.sparse.dynamic_mask import DynamicMaskAttention, dynamic_mask, published_mask


def module(**config) -> DynamicMaskAttention:
    torch.manual_seed(0)
    layer = DynamicMaskAttention(**{"dim": 16, "num_heads": 4, "num_kv_heads": 2, "window_size": 3, **config}).double()
    with torch.no_grad():
        layer.A.copy_(torch.tensor([-0.7, 0.9])[: len(layer.A)])
    return layer


def chosen(worth: list[float], query: int, window_size: int) -> set[int]:
    best = sorted(range(query + 1), key=lambda j: (worth[j], j), reverse=True)[:window_size]
    return {j for j in best if worth[j] > -math.inf}


def naive(layer: DynamicMaskAttention, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Of x (B, N, C), head by head and query by query."""
    q, k, v = layer.qkv(x, x)
    rows = []
    for b in range(len(x)):
        z = torch.nn.functional.softplus(layer.dt_proj(torch.cat([*v[b]], -1)))  # (N, Hk)
        for i in range(x.shape[1]):
            heads = []
            for h in range(layer.num_heads):
                g = h // (layer.num_heads // layer.num_kv_heads)
                worth = z[:, g] * layer.A[g]
                worth = worth.exp() if layer.bias_form == "exp" else worth
                worth = worth if valid is None else worth.masked_fill(~valid[b], -math.inf)
                keys = sorted(chosen(worth.tolist(), i if layer.causal else x.shape[1] - 1, layer.window_size))
                scores = torch.stack([q[b, h, i] @ k[b, g, j] / math.sqrt(layer.head_dim) + worth[j] for j in keys])
                heads.append(scores.softmax(0) @ v[b, g, keys])
            rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    "config", [{}, {"bias_form": "linear"}, {"causal": False}, {"window_size": 20}, {"bias": True}]
)
def test_it_is_its_equations(config) -> None:
    layer = module(**config)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("window_size", [1, 6, 40])
def test_chunks_and_steps_change_nothing(monkeypatch, size: int, window_size: int) -> None:
    layer = module(window_size=window_size)
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    valid = torch.rand(2, 23) > 0.3
    valid[:, 0] = True
    want = naive(layer, x, valid)
    monkeypatch.setattr(file, "_CHUNK", size)
    torch.testing.assert_close(layer(x, valid=valid), want, atol=1e-12, rtol=0)
    state, got = None, []
    for piece, real in zip(x.split(7, 1), valid.split(7, 1), strict=True):
        y, state = layer.stream(piece, state, valid=real)
        got.append(y)
        assert state.key.shape[2] <= window_size
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-12, rtol=0)


def test_the_state_stops_growing() -> None:
    layer = module(window_size=5)
    _, early = layer.stream(torch.randn(1, 5, 16, dtype=torch.float64))
    _, late = layer.stream(torch.randn(1, 60, 16, dtype=torch.float64), early)
    assert state_bytes(late) == state_bytes(early)
    assert late.length == 65


@pytest.mark.parametrize(("queries", "window_size"), [(None, 3), (9, 1), (4, 5), (0, 9)])
def test_the_mask_is_its_definition(queries: int | None, window_size: int) -> None:
    """The keys before the queries are as many as the window at most, so all of them are in the race."""
    worth = torch.randint(0, 4, (2, 3, 9)).double()  # many ties
    worth[0, 1, 2] = -math.inf
    got = dynamic_mask(worth, window_size, queries)
    n = 9 if queries is None else queries
    assert got.shape == (2, 3, n, 9)
    for b in range(2):
        for h in range(3):
            for i in range(n):
                keys = chosen(worth[b, h].tolist(), 9 - n + i, window_size)
                assert set(got[b, h, i].nonzero().flatten().tolist()) == keys


def test_the_published_choice_is_the_same_without_ties_and_as_many_with_them() -> None:
    worth = torch.randn(2, 3, 20)
    assert torch.equal(published_mask(worth, 6), dynamic_mask(worth, 6))
    ties = torch.zeros(1, 1, 20)
    count = torch.arange(1, 21).clamp(max=6)
    assert torch.equal(published_mask(ties, 6)[0, 0].sum(-1), count)
    layer, published = module(), module(ties="topk")
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(published(x), layer(x), atol=1e-12, rtol=0)
    with pytest.raises(Unsupported, match="ties"):
        published.stream(x)


def test_as_initialised_it_is_a_sliding_window() -> None:
    worth = torch.ones(1, 1, 15)
    distance = torch.arange(15)[:, None] - torch.arange(15)
    assert torch.equal(dynamic_mask(worth, 4)[0, 0], (distance >= 0) & (distance < 4))


def test_cross_attention_sees_the_worthiest_of_the_context() -> None:
    layer = module(causal=False, rope_theta=None)
    x, context = torch.randn(1, 5, 16, dtype=torch.float64), torch.randn(1, 9, 16, dtype=torch.float64)
    out = layer(x, context)
    v = layer.qkv(x, context)[2]
    keys = layer.worth(v).topk(3, -1).indices.flatten().unique()
    assert len(keys) < 9
    rest = [j for j in range(9) if j not in keys.tolist()]
    changed = context.clone()
    changed[:, rest] = context[:, rest].roll(1, 1)  # the same in another order
    torch.testing.assert_close(layer(x, changed), out, atol=1e-12, rtol=0)


def test_gradients() -> None:
    layer = module(dim=4, num_heads=2, num_kv_heads=1, window_size=2)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    a = layer.A.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: torch.func.functional_call(layer, {"A": a}, (x.detach(),)), a)


def test_refusals() -> None:
    for wrong in ({"window_size": 0}, {"bias_form": "log"}, {"ties": "first"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            module(**wrong)
    with pytest.raises(ShapeError, match="worth"):
        dynamic_mask(torch.zeros(3, 4), 2)
    with pytest.raises(ArgumentError, match="queries"):
        dynamic_mask(torch.zeros(1, 3, 4), 2, 5)
    with pytest.raises(Unsupported, match="sliding_window"):
        DynamicMaskAttention.from_official({}, hidden_size=16, sliding_window=4)
    with pytest.raises(Unsupported, match="rope_parameters"):
        DynamicMaskAttention.from_official({}, hidden_size=16, rope_parameters={"rope_type": "yarn"})
