"""A trained layer of in-context regression with the theory beside it (arXiv:2503.12734)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from regard.mechanisms.heads.in_context import InContextAttention
from regard.probes.in_context import CircuitStatistics, circuit_statistics, extract_circuits
from regard.tasks.in_context import LinearRegressionTask, bayes, best_step, debiased_gd, gd, softmax_kernel


@dataclass(frozen=True)
class Comparison:
    """Mean squared errors on the same prompts, and the numbers of the circuits.

    Attributes:
        errors: by predictor: the model, the kernel that its ω and μ alone give, Bayes, both kinds of gradient descent
            with their best step, and the trivial answer 0.
        step: Σ μ_h ω_h of the model; best_step: what the theory says.
        statistics: of the circuits.
    """

    errors: dict[str, float]
    step: float
    best_step: float
    statistics: CircuitStatistics

    def __str__(self) -> str:
        """Theory beside measurement."""
        found = self.statistics
        lines = [f"{'predictor':<14}squared error", *(f"{name:<14}{error:.4f}" for name, error in self.errors.items())]
        lines += ["", f"{'':<14}{'measured':>9}{'theory':>9}"]
        lines += [f"{'step':<14}{self.step:>9.3f}{self.best_step:>9.3f}"]
        lines += [f"{'|sum of mu|':<14}{found.mu_sum:>9.3f}{0:>9.3f}"]
        lines += ["", f"{'head':<6}{'omega':>9}{'mu':>9}{'other KQ':>10}{'other OV':>10}"]
        columns = zip(found.omega, found.mu, found.other_kq, found.other_ov, strict=True)
        lines += [f"{h:<6}{o:>9.3f}{m:>9.3f}{q:>10.3f}{v:>10.3f}" for h, (o, m, q, v) in enumerate(columns)]
        return "\n".join(lines)


def train_in_context(
    model: nn.Module,
    task: LinearRegressionTask,
    steps: int = 3000,
    batch: int = 256,
    lr: float = 5e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Adam on fresh prompts, the loss of each step; the paper takes half a million steps at 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        z_q, z, y_q = task.sample(batch, generator)
        loss = (model(z_q, z) - y_q).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def compare_predictors(
    model: InContextAttention, task: LinearRegressionTask, samples: int = 4096, seed: int = 1
) -> Comparison:
    """What the model does beside what the theory says, on fresh prompts; ``print`` shows it as a table.

    Args:
        model: one layer for tokens of ``task.d + 1`` channels.
        task: may have another length than the model was trained on.
        samples: prompts.
        seed: of the prompts.
    """
    z_q, z, y_q = task.sample(samples, torch.Generator().manual_seed(seed))
    found = circuit_statistics(*extract_circuits(model), task.d)
    step = best_step(task.d, task.length, task.noise_std)
    answers = {
        "model": model(z_q, z),
        "its kernel": softmax_kernel(z_q, z, found.omega, found.mu),
        "Bayes": bayes(z_q, z, task.noise_std),
        "GD": gd(z_q, z, step),
        "debiased GD": debiased_gd(z_q, z, step),
        "zero": torch.zeros_like(y_q),
    }
    errors = {name: float((answer - y_q).square().mean()) for name, answer in answers.items()}
    return Comparison(errors, float((found.mu * found.omega).sum()), step, found)


def in_context_study(
    num_heads: int = 2, task: LinearRegressionTask | None = None, steps: int = 3000, seed: int = 0
) -> tuple[InContextAttention, Comparison]:
    """Train one layer (15 s on one core) and compare it with the theory, on queries without noise.

    print(in_context_study()[1])
    """
    task = LinearRegressionTask() if task is None else task
    torch.manual_seed(seed)
    model = InContextAttention(task.d + 1, num_heads)
    for _ in train_in_context(model, task, steps, seed=seed):
        pass
    clean = LinearRegressionTask(task.d, task.length, task.noise_std, task.cov, clean_query=True)
    return model, compare_predictors(model, clean)
