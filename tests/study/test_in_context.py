"""Training in-context regression: where it ends is where the theory says."""

import pytest
import torch

from regard.probes.in_context import circuit_statistics, extract_circuits
from regard.study.findings.in_context import compare_predictors, train_in_context
from regard.tasks.in_context import LinearRegressionTask
from tests.probes.test_in_context import by_hand


def test_two_heads_of_opposite_sign_beat_one() -> None:
    """From uneven heads, whose step is too small and whose μ do not sum to zero; training sets both right.

    From default weights two heads take some 3000 steps to part; ``regard study in-context`` does that.
    """
    task, errors, longer = LinearRegressionTask(), {}, {}
    for heads in (1, 2):
        model = by_hand(5, torch.tensor([0.6, -0.4])[:heads], torch.tensor([0.9, -0.4])[:heads])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        before = circuit_statistics(*extract_circuits(model), 5)
        for _ in train_in_context(model, task, 300 * heads, 64, 1e-2):
            pass
        found = compare_predictors(model, LinearRegressionTask(clean_query=True))
        errors[heads] = found.errors["model"]
        longer[heads] = compare_predictors(model, LinearRegressionTask(length=160, clean_query=True)).errors["model"]
        assert found.errors["its kernel"] == pytest.approx(errors[heads], rel=0.15)
        assert errors[heads] > found.errors["Bayes"]
    assert before.mu_sum > 0.2 * before.mu.abs().max()
    assert errors[2] < 0.6 * errors[1]
    assert longer[2] < 0.6 * longer[1]
    assert longer[2] < errors[2]
    statistics = found.statistics
    assert statistics.omega[0] * statistics.omega[1] < 0
    assert (statistics.mu * statistics.omega > 0).all()
    assert statistics.mu_sum < 0.05 * statistics.mu.abs().max()
    assert found.step == pytest.approx(found.best_step, rel=0.15)
