"""Targets of random-feature attention: their formulas, moments and symmetry."""

import math

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks.random_features import PermutationInvariantTask

BETA = torch.tensor([0.6, 0.0, -0.8])


@pytest.mark.parametrize("name", ["f1", "f2", "f3"])
@pytest.mark.parametrize("power", [1, 3])
def test_targets_equal_sums(name, power) -> None:
    task = PermutationInvariantTask(name, 3, 4, power, BETA, torch.exp, torch.sin)
    x0, keys, y = task.sample(5, torch.Generator().manual_seed(0))
    for b in range(5):
        total = 0.0
        for key in keys[b].tolist():
            along = 0.6 * key[0] - 0.8 * key[2]
            shared = sum(a * c for a, c in zip(x0[b].tolist(), key, strict=True))
            total += {
                "f1": along**power,
                "f2": shared**power * along,
                "f3": math.exp(shared) * math.sin(along),
            }[name]
        assert y[b].item() == pytest.approx(total / 4, abs=1e-6)
    torch.testing.assert_close(task(x0, keys.flip(1)), y)


def test_samples_are_uniform_on_the_sphere() -> None:
    task = PermutationInvariantTask("f1", 5, 3)
    x0, keys, y = task.sample(20000, torch.Generator().manual_seed(0))
    assert (x0.shape, keys.shape, y.shape) == ((20000, 5), (20000, 3, 5), (20000,))
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(20000, 3, dtype=torch.float64))
    torch.testing.assert_close(x0.T @ x0 / 20000, torch.eye(5, dtype=torch.float64) / 5, atol=0.01, rtol=0)
    # <x, e_1>² of a uniform x has mean 1 / d and variance 2 (d - 1) / d² (d + 2)
    assert y.mean().item() == pytest.approx(1 / 5, rel=0.02)
    assert y.var().item() == pytest.approx(2 * 4 / 25 / 7 / 3, rel=0.05)
    again = task.sample(20000, torch.Generator().manual_seed(0))
    assert torch.equal(again.y, y)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="name: expected 'f1', 'f2' or 'f3', got 'f4'"):
        PermutationInvariantTask("f4")
    for name in ("dim", "num_keys", "power"):
        with pytest.raises(ArgumentError, match=f"{name}: expected at least 1, got 0"):
            PermutationInvariantTask(**{name: 0})
    with pytest.raises(ArgumentError, match=r"beta: expected a unit vector \(4,\), got \(3,\) of norm 1"):
        PermutationInvariantTask(dim=4, beta=BETA)
    with pytest.raises(ArgumentError, match=r"got \(3,\) of norm 2"):
        PermutationInvariantTask(dim=3, beta=2 * BETA)
