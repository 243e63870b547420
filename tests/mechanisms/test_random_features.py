"""Random-feature attention against loops, its symmetries, its fit against a generic solver, and its kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.heads.random_features import (
    RIDGES,
    RandomFeatureAttention,
    RandomFeatureMLP,
    attention_random_kernel,
)
from regard.tasks.random_features import PermutationInvariantTask


def sphere(*size: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def with_one(x: torch.Tensor) -> list[float]:
    return [*x.tolist(), 1.0]


def score(query: list[float], weight: torch.Tensor, key: list[float]) -> float:
    return sum(q * weight[i, j].item() * k for i, q in enumerate(query) for j, k in enumerate(key))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_a_layer_equals_loops_over_heads_and_keys(activation, mu) -> None:
    model = RandomFeatureAttention(3, 4, mean_scale=mu, activation=activation).double()
    model.value.copy_(torch.randn(16))
    x0, keys = sphere(2, 3), sphere(2, 5, 3, seed=1)
    values = model.value.reshape(4, 4).tolist()
    for b in range(2):
        total = 0.0
        for m in range(4):
            extended = [with_one(key) for key in keys[b]]
            scores = [score(with_one(x0[b]), model.weight[m], key) for key in extended]
            if activation == "softmax":
                weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
            else:
                weights = [max(s, 0.0) / 5 for s in scores]
            for weight, key in zip(weights, extended, strict=True):
                total += weight * sum(v * x for v, x in zip(values[m], key, strict=True))
        assert model(x0, keys)[b].item() == pytest.approx(total, abs=1e-12)


@torch.no_grad()
def test_the_baseline_equals_loops() -> None:
    model = RandomFeatureMLP(3, 2, 7).double()
    model.value.copy_(torch.randn(7))
    x0, keys = sphere(1, 3), sphere(1, 2, 3, seed=1)
    flat = [*x0[0].tolist(), *keys[0, 0].tolist(), *keys[0, 1].tolist(), 1.0]
    weights = model.weight.tolist()
    hidden = [max(0.0, sum(w * x for w, x in zip(row, flat, strict=True))) for row in weights]
    want = sum(v * h for v, h in zip(model.value.tolist(), hidden, strict=True))
    assert model(x0, keys).item() == pytest.approx(want, abs=1e-12)
    assert all(sum(w * w for w in row) == pytest.approx(1, abs=1e-6) for row in weights)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    activation=st.sampled_from(["relu", "softmax"]),
    mu=st.sampled_from([0.0, 1.5]),
    n=st.integers(1, 9),
    times=st.integers(2, 4),
    seed=st.integers(0, 1000),
)
def test_keys_are_a_set_with_shares(activation, mu, n, times, seed) -> None:
    """Their order does not matter, and neither does how often all of them are repeated."""
    model = RandomFeatureAttention(4, 6, mean_scale=mu, activation=activation, seed=seed).double()
    model.value.copy_(torch.randn(30))
    x0, keys = sphere(3, 4, seed=seed), sphere(3, n, 4, seed=seed + 1)
    want = model(x0, keys)
    order = torch.randperm(n)
    assert (model(x0, keys[:, order]) - want).abs().max() < 1e-12
    assert (model(x0, keys.repeat(1, times, 1)) - want).abs().max() < 1e-12


def test_weights_have_the_mean_and_spread_asked_for() -> None:
    weight = RandomFeatureAttention(7, 4000, weight_std=0.5, mean_scale=2.0, seed=3).weight
    mean = 2 * torch.eye(8)
    mean[7, 7] = 0
    torch.testing.assert_close(weight.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(weight.std(0), torch.full((8, 8), 0.5), atol=0.03, rtol=0)
    assert torch.equal(RandomFeatureAttention(3, 2, seed=1).weight, RandomFeatureAttention(3, 2, seed=1).weight)
    assert not torch.equal(RandomFeatureAttention(3, 2, seed=1).weight, RandomFeatureAttention(3, 2, seed=2).weight)


@pytest.mark.parametrize("n", [12, 60])  # fewer samples than features, and more
def test_fit_is_the_minimum_of_its_loss(n) -> None:
    x0, keys, y = PermutationInvariantTask("f2", 4, 3).sample(n, torch.Generator().manual_seed(0))
    model = RandomFeatureAttention(4, 8).double()
    assert model.fit(x0, keys, y, 1e-2) == 1e-2
    features = model.features(x0, keys)
    strength = 1e-2 * features.square().sum(1).mean()
    # ridge regression is least squares on the features with √λ I below them
    rows = torch.cat([features, strength.sqrt() * torch.eye(40, dtype=torch.float64)])
    target = torch.cat([y - y.mean(), torch.zeros(40, dtype=torch.float64)])
    want = torch.linalg.lstsq(rows, target[:, None]).solution[:, 0]
    torch.testing.assert_close(model.value.detach(), want)
    torch.testing.assert_close(model(x0, keys), y.mean() + features @ want)


def test_validation_chooses_the_ridge() -> None:
    """What it chooses is the best of those that one would get alone."""
    task, generator = PermutationInvariantTask("f1", 4, 6), torch.Generator().manual_seed(1)
    train, held_out = task.sample(80, generator), task.sample(100, generator)
    model = RandomFeatureAttention(4, 30).double()

    def error() -> float:
        return (model(held_out.x0, held_out.keys) - held_out.y).square().mean().item()

    ridges = (*RIDGES, 1.0)
    alone = {}
    for ridge in ridges:
        model.fit(*train, ridge)
        alone[ridge] = error()
    assert model.fit(*train, ridges, held_out) == min(alone, key=alone.__getitem__)
    assert error() == pytest.approx(min(alone.values()))


def test_a_softmax_layer_learns_too_and_values_have_gradients() -> None:
    task, generator = PermutationInvariantTask("f1", 4, 6, power=1), torch.Generator().manual_seed(0)
    train, test = task.sample(400, generator), task.sample(200, generator)
    model = RandomFeatureAttention(4, 50, activation="softmax").double()
    model.fit(*train)
    assert (model(test.x0, test.keys) - test.y).square().mean() < 0.05 * test.y.var()
    assert [name for name, _ in model.named_parameters()] == ["value"]
    model(test.x0, test.keys).sum().backward()
    torch.testing.assert_close(model.value.grad, model.features(test.x0, test.keys).sum(0))


def kernel(x: torch.Tensor, y: torch.Tensor, std: float) -> float:
    """By its definition, for one X and X' with the query first."""
    total = 0.0
    (x0, *keys), (y0, *others) = ([torch.tensor(with_one(row), dtype=torch.float64) for row in s] for s in (x, y))
    for a in keys:
        for b in others:
            u, w = torch.outer(x0, a).flatten(), torch.outer(y0, b).flatten()
            cos = float(u @ w / (u.norm() * w.norm()))
            angle = math.acos(max(-1.0, min(1.0, cos)))
            arc = std**2 * float(u.norm() * w.norm()) * (math.sin(angle) + (math.pi - angle) * cos) / (2 * math.pi)
            total += arc * float(a @ b)
    return total / (len(keys) * len(others))


def test_kernel_equals_its_definition() -> None:
    x, y = 1.7 * sphere(3, 5, 4), sphere(2, 3, 4, seed=1)
    want = [[kernel(a, b, 0.5) for b in y] for a in x]
    torch.testing.assert_close(attention_random_kernel(x, y), torch.tensor(want, dtype=torch.float64))


@torch.no_grad()
def test_many_heads_tend_to_the_kernel() -> None:
    x = sphere(6, 5, 4)
    features = RandomFeatureAttention(4, 20000).double().features(x[:, 0], x[:, 1:])
    want = attention_random_kernel(x, x)
    assert (features @ features.T / 20000 - want).norm() < 0.03 * want.norm()
    assert torch.linalg.eigvalsh(want).min() > -1e-12


def test_reached_by_name() -> None:
    model = regard.create("random-feature-attention-theory", dim=4, num_heads=3)
    assert isinstance(model, RandomFeatureAttention)
    assert model.features(sphere(2, 4).float(), sphere(2, 6, 4).float()).shape == (2, 15)
    baseline = regard.create("random-feature-attention-theory/mlp", dim=4, num_keys=6, num_features=15)
    assert baseline(sphere(2, 4).float(), sphere(2, 6, 4).float()).shape == (2,)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="num_heads: expected at least 1, got 0"):
        RandomFeatureAttention(3, 0)
    with pytest.raises(ArgumentError, match="weight_std: expected a number above 0"):
        RandomFeatureAttention(3, 2, weight_std=0.0)
    with pytest.raises(ArgumentError, match="activation: expected 'relu' or 'softmax', got 'gelu'"):
        RandomFeatureAttention(3, 2, activation="gelu")
    with pytest.raises(ArgumentError, match="num_features"):
        RandomFeatureMLP(3, 2, 0)
    model = RandomFeatureAttention(3, 2)
    with pytest.raises(ShapeError, match=r"x0: expected \(B, 3\), got \(2, 4\)"):
        model(torch.randn(2, 4), torch.randn(2, 5, 4))
    with pytest.raises(ShapeError, match=r"keys: expected \(2, N, 3\), got \(2, 0, 3\)"):
        model(torch.randn(2, 3), torch.randn(2, 0, 3))
    with pytest.raises(ShapeError, match=r"keys: expected \(B, 2, 3\), got \(2, 5, 3\)"):
        RandomFeatureMLP(3, 2, 4)(torch.randn(2, 3), torch.randn(2, 5, 3))
    x0, keys, y = torch.randn(6, 3), torch.randn(6, 5, 3), torch.randn(6)
    with pytest.raises(ArgumentError, match="ridge: expected numbers above 0, got 0"):
        model.fit(x0, keys, y, 0)
    with pytest.raises(ArgumentError, match="validation: expected samples to choose among 5 ridges"):
        model.fit(x0, keys, y, RIDGES)
    with pytest.raises(ShapeError, match=r"y: expected \(6,\), got \(6, 1\)"):
        model.fit(x0, keys, y[:, None])
    with pytest.raises(ShapeError, match=r"x: expected .* with a query and keys"):
        attention_random_kernel(torch.randn(2, 1, 3), torch.randn(2, 4, 3))
    with pytest.raises(ShapeError, match=r"other: expected \(B, N \+ 1, 3\)"):
        attention_random_kernel(torch.randn(2, 4, 3), torch.randn(2, 4, 5))
