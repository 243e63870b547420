"""A layer trained on in-context regression, and which predictor its heads came to be (arXiv:2503.12734)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regard.errors import require
from regard.mechanisms.heads.in_context import InContextAttention
from regard.probes.in_context import CircuitStatistics, circuit_statistics, extract_circuits
from regard.study.finding import Claim, Finding, Progress
from regard.tasks.in_context import LinearRegressionTask, bayes, best_step, debiased_gd, gd, softmax_kernel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADS = (1, 2, 4)
_LENGTHS = (10, 20, 40, 80, 160, 320)
_COLOURS = {1: "#d62728", 2: "#1f77b4", 4: "#2ca02c"}


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


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Train layers of one, two and four heads and read them; two minutes."""
    steps, samples = (20, 256) if quick else (3000, 8192)
    task = LinearRegressionTask()
    report = on_progress or (lambda what, done, total: None)
    layers: dict[str, Any] = {}
    for heads in _HEADS:
        torch.manual_seed(seed)
        model = InContextAttention(task.d + 1, heads)
        for step, _ in enumerate(train_in_context(model, task, steps, seed=seed)):
            if step % 20 == 0:
                report(f"{heads} heads", step, steps)
        # from one length to the next only the prompts change
        found = [
            compare_predictors(model, replace(task, length=n, clean_query=True), samples, seed + 1) for n in _LENGTHS
        ]
        layers[str(heads)] = {
            "errors": {name: [comparison.errors[name] for comparison in found] for name in found[0].errors},
            "step": found[0].step,
            "heads": {
                name: value.tolist() for name, value in found[0].statistics._asdict().items() if value.dim() == 1
            },
            "KQ": extract_circuits(model).KQ.div((task.d + 1) ** 0.5).tolist(),
        }
    report("done", steps, steps)
    data = {
        "lengths": _LENGTHS,
        "trained on": task.length,
        "best_step": best_step(task.d, task.length, task.noise_std),
        "layers": layers,
    }
    return Finding(
        name="in-context",
        title="Which predictor the heads of in-context regression become",
        systems=("icl-linear-attention",),
        summary=_SUMMARY,
        claims=tuple(_claims(data)),
        settings={
            "d": task.d,
            "L": task.length,
            "noise variance": round(task.noise_std**2, 6),
            "steps": steps,
            "batch": 256,
            "Adam": 5e-3,
            "test prompts": samples,
        },
        data=data,
    )


_SUMMARY = """
One softmax attention layer, from default weights, learns to answer x_q from examples of a linear map that changes with
every prompt. What it computes can be read from two products of its weights: KQ, which is to become a multiple ω of the
identity on x, and OV, of which only the label's entry μ is to remain, so that the answer is
Σ_h μ_h Σ_l softmax_l(ω_h x_qᵀx_l) y_l. With two heads or more of opposite signs and Σ_h μ_h = 0, small ω make that one
step of gradient descent on the examples, their mean taken off; the best step is 1 / (1 + (d + 1 + σ²d) / L).

Labels of test queries are without noise, and their variance is 1. The paper trains 170 times as long.
"""


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
    """What the model does beside what the theory says, on fresh prompts.

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


def _claims(data: dict[str, Any]) -> list[Claim]:
    trained, longer = (data["lengths"].index(n) for n in (data["trained on"], 4 * data["trained on"]))
    layers = {heads: data["layers"][str(heads)] for heads in _HEADS}
    at = {heads: layer["errors"]["model"][trained] for heads, layer in layers.items()}
    far = {heads: layer["errors"]["model"][longer] for heads, layer in layers.items()}
    two, theory = layers[2]["heads"], {name: found[trained] for name, found in layers[2]["errors"].items()}
    largest = max(map(abs, two["mu"]))
    claims = [
        Claim(
            "squared error of 1, 2, 4 heads",
            "two heads below 0.6 × one head, and four no better than two",
            ", ".join(f"{error:.3f}" for error in at.values()),
            at[2] < 0.6 * at[1] and at[4] > 0.9 * at[2],
        ),
        Claim(
            "squared error of two heads",
            f"debiased gradient descent {theory['debiased GD']:.3f} (plain {theory['GD']:.3f}, "
            f"Bayes {theory['Bayes']:.3f})",
            f"{at[2]:.3f}",
            abs(at[2] / theory["debiased GD"] - 1) < 0.15,
        ),
        Claim(
            "squared error of the kernel with the two heads' ω and μ alone",
            "the layer's own",
            f"{theory['its kernel']:.3f}",
            abs(theory["its kernel"] / at[2] - 1) < 0.05,
        ),
        Claim(
            f"squared error of 1, 2, 4 heads on {4 * data['trained on']} examples, untrained for that",
            "falls further; two heads below 0.6 × one head",
            ", ".join(f"{error:.3f}" for error in far.values()),
            all(far[h] < at[h] for h in _HEADS) and far[2] < 0.6 * far[1],
        ),
        Claim(
            "ω of two heads",
            "equal magnitudes, opposite signs",
            _list(two["omega"]),
            two["omega"][0] * two["omega"][1] < 0 and abs(sum(two["omega"])) < 0.1 * max(map(abs, two["omega"])),
        ),
        Claim(
            "largest other entry of KQ on x, over |ω|",
            "0",
            _list(q / abs(o) for q, o in zip(two["other_kq"], two["omega"], strict=True)),
            all(q < 0.2 * abs(o) for q, o in zip(two["other_kq"], two["omega"], strict=True)),
        ),
        Claim(
            "μ of two heads, and the largest other entry of OV",
            "signs of ω, sum 0; others 0",
            f"{_list(two['mu'])}, sum {sum(two['mu']):.3f}; {max(two['other_ov']):.3f}",
            all(m * o > 0 for m, o in zip(two["mu"], two["omega"], strict=True))
            and abs(sum(two["mu"])) < 0.05 * largest
            and max(two["other_ov"]) < 0.05 * largest,
        ),
        Claim(
            "|Σ μ| of four heads, over the largest |μ|",
            "0",
            f"{abs(sum(layers[4]['heads']['mu'])) / max(map(abs, layers[4]['heads']['mu'])):.3f}",
            abs(sum(layers[4]["heads"]["mu"])) < 0.05 * max(map(abs, layers[4]["heads"]["mu"])),
        ),
        Claim(
            "step Σ μ ω of 2, 4 heads",
            f"{data['best_step']:.3f}",
            ", ".join(f"{layers[h]['step']:.3f}" for h in (2, 4)),
            all(abs(layers[h]["step"] / data["best_step"] - 1) < 0.15 for h in (2, 4)),
        ),
    ]
    return claims


def _list(values: Any) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def draw(finding: Finding) -> "Figure":
    """KQ of the two heads, ω against μ of all, and errors against the number of examples."""
    figure: Figure = require("matplotlib.figure", "draw the figure").Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.4, 1.8))
    data, two = finding.data, finding.data["layers"]["2"]
    limit = max(abs(x) for head in two["KQ"] for row in head[:-1] for x in row)  # the label's row meets a 0
    for h, (plot, matrix) in enumerate(zip(axes, two["KQ"], strict=False)):
        image = plot.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
        plot.set_title(f"KQ / √E of head {h + 1} of 2", fontsize=10)
        plot.set(xticks=[], yticks=[], xlabel=f"μ = {two['heads']['mu'][h]:.2f}")
    figure.colorbar(image, ax=axes[1], shrink=0.7)
    _heads(axes[2], data)
    _errors(axes[3], data)
    return figure


def _heads(axes: Any, data: Any) -> None:
    for heads in _HEADS:
        found = data["layers"][str(heads)]["heads"]
        label = f"{heads} head" + "s" * (heads > 1)
        axes.plot(found["omega"], found["mu"], "o", color=_COLOURS[heads], label=label, alpha=0.8)
    for line in (axes.axhline, axes.axvline):
        line(0, color="grey", linewidth=0.7)
    axes.set(xlabel="ω", ylabel="μ")
    axes.set_title("what is left of each head", fontsize=10)
    axes.legend(fontsize=8)


def _errors(axes: Any, data: Any) -> None:
    lengths: Sequence[int] = data["lengths"]
    for heads in _HEADS:
        label = f"{heads} head" + "s" * (heads > 1)
        axes.plot(lengths, data["layers"][str(heads)]["errors"]["model"], "o-", color=_COLOURS[heads], label=label)
    theory = data["layers"]["2"]["errors"]
    for name, style in (("debiased GD", "--"), ("Bayes", ":")):
        axes.plot(lengths, theory[name], style, color="black", label=f"{name}, made for each length")
    axes.axvline(data["trained on"], color="grey", linewidth=0.7)
    axes.set(xscale="log", yscale="log", xlabel="examples", ylabel="squared error")
    axes.set_title(f"trained on {data['trained on']} examples", fontsize=10)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
