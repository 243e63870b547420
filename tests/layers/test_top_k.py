"""Winners over positions against sorting, and what the context manager leaves behind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers.hooks import captured
from regard.layers.top_k import TopKSpatial, apply_topk


def winners(values: list[float], p: float, by: str) -> list[float]:
    """One channel, from the definition."""
    rank = [abs(v) if by == "abs" else v for v in values]
    threshold = sorted(rank, reverse=True)[math.ceil(p * len(values)) - 1]
    return [v if r >= threshold else 0.0 for v, r in zip(values, rank, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    p=st.sampled_from([0.1, 0.125, 0.25, 0.5, 0.75, 1.0]),
    by=st.sampled_from(["value", "abs"]),
    first=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_tokens_and_maps_equal_sorting(n, p, by, first, seed) -> None:
    x = torch.randint(-4, 5, (2, first + n, 3), generator=torch.Generator().manual_seed(seed)).double()  # with ties
    got = TopKSpatial(p, by, first)(x)
    assert torch.equal(got[:, :first], x[:, :first])
    for b in range(2):
        for c in range(3):
            assert got[b, first:, c].tolist() == winners(x[b, first:, c].tolist(), p, by)
    maps = x[:, first:].mT.unflatten(2, (1, n))
    assert torch.equal(TopKSpatial(p, by)(maps).flatten(2).mT, got[:, first:])


def test_cases_by_hand() -> None:
    x = torch.arange(10.0).reshape(1, 10, 1).expand(1, 10, 4) + 1
    kept = TopKSpatial(0.2, exempt_cls=False)(x)
    assert (kept != 0).sum(1).tolist() == [[2] * 4]
    assert kept[0, :, 0].tolist() == [0] * 8 + [9, 10]
    same = torch.full((1, 10, 4), 3.0)
    assert torch.equal(TopKSpatial(0.2)(same), same)
    assert torch.equal(TopKSpatial(1.0)(-x), -x)
    many = TopKSpatial(0.29, exempt_cls=False)(torch.arange(100.0).reshape(1, 100, 1) + 1)
    assert (many != 0).sum() == 29  # 0.29 × 100 is a little above 29 in floating point


def test_gradients_pass_through_what_is_kept() -> None:
    x = torch.tensor([[[5.0], [1.0], [4.0], [3.0]]], requires_grad=True)
    (2 * TopKSpatial(0.5, exempt_cls=False)(x)).sum().backward()
    assert x.grad.flatten().tolist() == [2, 0, 2, 0]


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x, "more"


def test_a_model_has_it_inside_the_block_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = torch.randn(2, 1, 4, 4)
    before = model(x)
    with apply_topk(model, ["0", "1"], 0.25), captured(model, ["1"]) as outputs:
        inside = model(x)
        top_k = TopKSpatial(0.25)
        torch.testing.assert_close(inside, model[2](top_k(model[1](top_k(model[0](x))))))
    assert outputs["1"].shape == (2, 3, 4, 4)
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())
    pair = nn.Sequential(Pair())
    tokens = torch.randn(1, 5, 2)
    with apply_topk(pair, ["0"], 0.5):
        found, more = pair(tokens)
    assert more == "more"
    assert torch.equal(found, TopKSpatial(0.5)(tokens))


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Sequential(nn.Identity())
    with pytest.raises(ArgumentError, match="NaN"), apply_topk(model, ["0"], 0.5):
        model(torch.full((1, 1, 2, 2), float("nan")))
    assert not model[0]._forward_hooks


def test_refusals() -> None:
    for p in (0.0, 1.1, -0.5):
        with pytest.raises(ArgumentError, match="p: expected a share above 0 and at most 1"):
            TopKSpatial(p)
    with pytest.raises(ArgumentError, match="by: expected 'value' or 'abs', got 'rank'"):
        TopKSpatial(0.5, "rank")
    with pytest.raises(ArgumentError, match="exempt_cls"):
        TopKSpatial(0.5, exempt_cls=-1)
    with pytest.raises(ShapeError, match="at least one position"):
        TopKSpatial(0.5)(torch.zeros(1, 1, 3))
    with pytest.raises(ShapeError, match=r"x: expected \(B, C, H, W\) or \(B, N, C\), got \(2, 3\)"):
        TopKSpatial(0.5)(torch.zeros(2, 3))
    model = nn.Sequential(nn.Identity())
    with (
        pytest.raises(ArgumentError, match=r"layers: the model has no module \['conv'\]; it has: 0"),
        apply_topk(model, ["conv"], 0.5),
    ):
        pass
    with pytest.raises(ArgumentError, match="layers: expected a list of names, got '0'"), captured(model, "0"):
        pass
    with pytest.raises(Unsupported, match="layers that give a tensor, got a dict"), apply_topk(model, ["0"], 0.5):
        model({"x": 1})
    with pytest.raises(Unsupported, match="0 gives a dict"), captured(model, ["0"]):
        model({"x": 1})
