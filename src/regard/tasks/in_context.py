"""In-context linear regression: examples of a random linear map, a query, and what the best predictors answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError


class Prompt(NamedTuple):
    """z_q (B, 1, E) the query with zeros for its labels, z (B, L, E) the examples [x; y], y_q (B, 1, n_out)."""

    z_q: Tensor
    z: Tensor
    y_q: Tensor


@dataclass(frozen=True)
class LinearRegressionTask:
    """One map per prompt (arXiv:2503.12734).

        x ~ N(0, S)    β ~ N(0, I / d)    y = βᵀx + σε

    Args:
        d: of x; tokens have d + 1 channels.
        length: examples L; the paper has 8 d.
        noise_std: σ, on the query's label too.
        cov: S (d, d), the identity by default; see `decaying_covariance`.
        clean_query: no noise on the query's label.
    """

    d: int = 5
    length: int = 40
    noise_std: float = 0.1**0.5
    cov: Tensor | None = None
    clean_query: bool = False

    def __post_init__(self) -> None:
        _at_least_one(d=self.d, length=self.length)
        if self.cov is not None and self.cov.shape != (self.d, self.d):
            raise ArgumentError(f"cov: expected ({self.d}, {self.d}), got {tuple(self.cov.shape)}")

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Prompt:
        """Fresh prompts."""
        x = torch.randn(batch, self.length + 1, self.d, generator=generator)
        if self.cov is not None:
            x = x @ torch.linalg.cholesky(self.cov).mT
        beta = torch.randn(batch, self.d, 1, generator=generator) / self.d**0.5
        noise = self.noise_std * torch.randn(batch, self.length + 1, 1, generator=generator)
        return _prompt(x, x @ beta, noise, self.clean_query)


@dataclass(frozen=True)
class MultiTaskLinearRegression:
    """Several maps per prompt, each of a block of coordinates of its own; blocks may overlap (arXiv:2503.12734).

        y_t = β_tᵀ x[block t] + √d_t σε,  β_t ~ N(0, I),  the query's labels without noise

    Args:
        d: of x; tokens have d + tasks channels.
        blocks: sizes d_1, d_2 of the first and the last coordinates.
        length: examples.
        noise_std: σ.
    """

    d: int = 6
    blocks: Sequence[int] = (4, 4)
    length: int = 40
    noise_std: float = 0.1**0.5

    def __post_init__(self) -> None:
        _at_least_one(d=self.d, length=self.length)
        if len(self.blocks) != 2 or not all(1 <= size <= self.d for size in self.blocks):
            raise ArgumentError(f"blocks: expected two sizes from 1 to {self.d}, got {self.blocks}")

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Prompt:
        """Fresh prompts."""
        x = torch.randn(batch, self.length + 1, self.d, generator=generator)
        first, last = self.blocks
        parts = (x[..., :first], x[..., self.d - last :])
        y = torch.cat([part @ torch.randn(batch, part.shape[-1], 1, generator=generator) for part in parts], -1)
        spread = self.noise_std * torch.tensor([first**0.5, last**0.5])
        noise = spread * torch.randn(batch, self.length + 1, 2, generator=generator)
        return _prompt(x, y, noise, clean_query=True)


def decaying_covariance(d: int, rho: float) -> Tensor:
    """(d, d) S_ij = ρ^|i-j|."""
    if not -1 < rho < 1:
        raise ArgumentError(f"rho: expected a number between -1 and 1, got {rho}")
    at = torch.arange(d)
    return rho ** (at[:, None] - at).abs().float()


def bayes(z_q: Tensor, z: Tensor, noise_std: float) -> Tensor:
    """The best predictor, x_qᵀ (XᵀX + σ² d I)⁻¹ Xᵀy, (B, 1, 1)."""
    x, y, x_q = _parts(z_q, z)
    ridge = noise_std**2 * x.shape[-1] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return x_q @ torch.linalg.solve(x.mT @ x + ridge, x.mT @ y)


def gd(z_q: Tensor, z: Tensor, eta: float) -> Tensor:
    """One step of gradient descent from zero, (η / L) Σ y_l x_lᵀ x_q."""
    x, y, x_q = _parts(z_q, z)
    return eta * x_q @ (x.mT @ y) / x.shape[1]


def debiased_gd(z_q: Tensor, z: Tensor, eta: float) -> Tensor:
    """The same with the examples' mean taken off, (η / L) Σ y_l (x_l - x̄)ᵀ x_q."""
    x, y, x_q = _parts(z_q, z)
    return eta * x_q @ ((x - x.mean(1, keepdim=True)).mT @ y) / x.shape[1]


def best_step(d: int, length: int, noise_std: float) -> float:
    """η = 1 / (1 + (d + 1 + σ² d) / L), the step of least error."""
    return 1 / (1 + (d + 1 + noise_std**2 * d) / length)


def softmax_kernel(z_q: Tensor, z: Tensor, omega: Tensor, mu: Tensor) -> Tensor:
    """What trained heads come to: Σ_h μ_h Σ_l softmax_l(ω_h x_qᵀx_l) y_l, with ω, μ (H,)."""
    x, y, x_q = _parts(z_q, z)
    weights = (omega[:, None, None] * (x_q @ x.mT)[:, None]).softmax(-1)  # (B, H, 1, L)
    return (mu[:, None, None] * (weights @ y[:, None])).sum(1)


def _parts(z_q: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z[..., :-1], z[..., -1:], z_q[..., :-1]


def _prompt(x: Tensor, y: Tensor, noise: Tensor, clean_query: bool) -> Prompt:
    labels = y + noise
    z_q = torch.cat([x[:, -1:], torch.zeros_like(y[:, -1:])], -1)
    return Prompt(z_q, torch.cat([x, labels], -1)[:, :-1], (y if clean_query else labels)[:, -1:])


def _at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
