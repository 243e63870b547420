"""In-context regression: what is sampled, and the predictors' formulas and errors."""

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks.in_context import (
    LinearRegressionTask,
    MultiTaskLinearRegression,
    bayes,
    best_step,
    debiased_gd,
    decaying_covariance,
    gd,
    softmax_kernel,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_prompts_hold_a_linear_map() -> None:
    z_q, z, y_q = LinearRegressionTask(3, 24, noise_std=0.0).sample(5, seeded())
    assert (z_q.shape, z.shape, y_q.shape) == ((5, 1, 4), (5, 24, 4), (5, 1, 1))
    assert not z_q[..., -1].any()
    beta = torch.linalg.lstsq(z[..., :3], z[..., 3:]).solution
    torch.testing.assert_close(z_q[..., :3] @ beta, y_q, atol=1e-4, rtol=1e-4)
    again = LinearRegressionTask(3, 24, noise_std=0.0).sample(5, seeded())
    assert all(torch.equal(a, b) for a, b in zip((z_q, z, y_q), again, strict=True))


def test_moments() -> None:
    cov = decaying_covariance(4, 0.5)
    assert cov[0].tolist() == [1, 0.5, 0.25, 0.125]
    _, z, y_q = LinearRegressionTask(4, 30, 0.5, cov).sample(4096, seeded())
    x = z[..., :4].flatten(0, 1)
    torch.testing.assert_close(x.T @ x / len(x), cov, atol=0.02, rtol=0)
    assert z[..., 4].var().item() == pytest.approx(1 + 0.25, rel=0.05)  # tr S / d, and the noise
    assert y_q.var().item() == pytest.approx(1.25, rel=0.1)
    clean = LinearRegressionTask(4, 30, 0.5, cov, clean_query=True).sample(4096, seeded())
    assert torch.equal(clean.z, z)
    assert (y_q - clean.y_q).var().item() == pytest.approx(0.25, rel=0.1)


def test_several_tasks_read_their_own_blocks() -> None:
    z_q, z, y_q = MultiTaskLinearRegression(5, (3, 4), 40, noise_std=0.0).sample(6, seeded())
    assert (z_q.shape, z.shape, y_q.shape) == ((6, 1, 7), (6, 40, 7), (6, 1, 2))
    beta = torch.linalg.lstsq(z[..., :5], z[..., 5:]).solution
    torch.testing.assert_close(z_q[..., :5] @ beta, y_q, atol=1e-3, rtol=1e-3)
    assert beta[:, 3:, 0].abs().max() < 1e-4
    assert beta[:, :1, 1].abs().max() < 1e-4
    noisy = MultiTaskLinearRegression(5, (1, 4), 40, noise_std=1.0).sample(4096, seeded())
    variances = noisy.z[..., 5:].flatten(0, 1).var(0)
    torch.testing.assert_close(variances, torch.tensor([2.0, 8.0]), atol=0, rtol=0.1)  # d_t (1 + σ²)


def test_predictors_equal_sums() -> None:
    z_q, z, _ = LinearRegressionTask(3, 8).sample(2, seeded())
    z_q, z = z_q.double(), z.double()
    for b in range(2):
        x, y, query = z[b, :, :3], z[b, :, 3], z_q[b, 0, :3]
        mean = sum(x) / 8
        plain = sum(y[i] * (x[i] @ query) for i in range(8)) / 8
        centred = sum(y[i] * ((x[i] - mean) @ query) for i in range(8)) / 8
        assert gd(z_q, z, 0.7)[b].item() == pytest.approx(0.7 * plain.item())
        assert debiased_gd(z_q, z, 0.7)[b].item() == pytest.approx(0.7 * centred.item())
        ridge = torch.linalg.inv(sum(torch.outer(row, row) for row in x) + 0.2 * 3 * torch.eye(3, dtype=x.dtype))
        want = query @ ridge @ sum(y[i] * x[i] for i in range(8))
        assert bayes(z_q, z, 0.2**0.5)[b].item() == pytest.approx(want.item())
        kernel = 0.0
        for omega, mu in ((0.3, 2.0), (-0.1, 0.5)):
            weights = torch.stack([torch.exp(omega * (row @ query)) for row in x])
            kernel += mu * float(weights @ y / weights.sum())
        got = softmax_kernel(z_q, z, torch.tensor([0.3, -0.1]).double(), torch.tensor([2.0, 0.5]).double())
        assert got[b].item() == pytest.approx(kernel)


def test_a_small_kernel_of_two_signs_is_debiased_gradient_descent() -> None:
    z_q, z, _ = LinearRegressionTask(3, 8).sample(16, seeded())
    omega, eta = 1e-3, 0.8
    signs = torch.tensor([omega, -omega]).double()
    got = softmax_kernel(z_q.double(), z.double(), signs, eta / 2 / signs)
    torch.testing.assert_close(got, debiased_gd(z_q.double(), z.double(), eta), atol=1e-5, rtol=0)


def test_errors_are_the_known_ones() -> None:
    z_q, z, y_q = LinearRegressionTask(5, 40, clean_query=True).sample(20000, seeded())

    def error(answer: torch.Tensor) -> float:
        return (answer - y_q).square().mean().item()

    eta = best_step(5, 40, 0.1**0.5)
    assert eta == pytest.approx(0.86, abs=0.005)
    assert error(bayes(z_q, z, 0.1**0.5)) == pytest.approx(0.014, abs=0.002)
    assert error(gd(z_q, z, eta)) == pytest.approx(0.136, abs=0.01)
    assert error(debiased_gd(z_q, z, 0.88)) == pytest.approx(0.138, abs=0.01)
    pair = torch.tensor([0.05, -0.05])
    assert error(softmax_kernel(z_q, z, pair, 0.88 / 2 / pair)) == pytest.approx(0.138, abs=0.01)
    assert all(error(gd(z_q, z, eta)) <= error(gd(z_q, z, eta + shift)) for shift in (-0.1, 0.1))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LinearRegressionTask(0), "d: expected"),
        (lambda: LinearRegressionTask(3, 0), "length: expected"),
        (lambda: LinearRegressionTask(3, cov=torch.eye(2)), "cov: expected"),
        (lambda: MultiTaskLinearRegression(3, (4, 2)), "blocks: expected"),
        (lambda: MultiTaskLinearRegression(3, (1, 2, 3)), "blocks: expected"),
        (lambda: decaying_covariance(3, 1.0), "rho: expected"),
    ],
)
def test_refusals(make, match) -> None:
    with pytest.raises(ArgumentError, match=match):
        make()
