"""What a layer of random attention learns from how many samples, beside what the theory says (arXiv:2307.11353)."""

from collections.abc import Sequence
from math import comb, log, sqrt
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch

from regard.errors import require
from regard.mechanisms.heads.random_features import (
    RIDGES,
    RandomFeatureAttention,
    RandomFeatureMLP,
    RandomFeatureModel,
    attention_random_kernel,
)
from regard.study.finding import Claim, Finding, Progress
from regard.tasks.random_features import PermutationInvariantTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {"RFA": "random attention", "BRFA": "the same with μ = 2", "RFMLP": "random network"}
_COLOURS = {"RFA": "#1f77b4", "BRFA": "#2ca02c", "RFMLP": "#d62728"}
_DIM, _KEYS, _HEADS, _MU, _HELD_OUT = 12, 12, 200, 2.0, 500
#: of the study of N: fewer dimensions, so that the baseline gets there at all
_SMALL = 4
_WIDE = (*RIDGES, 0.1, 1.0, 10.0)
_HALF = 0.5


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Errors against samples, samples against keys, and the kernel of finitely many heads; five minutes."""
    seeds = 2 if quick else 3
    sizes = (50, 100) if quick else (250, 500, 1000, 2000)
    keys = (1, 2) if quick else (1, 2, 4, 8, 16)
    heads = (10, 100, 1000) if quick else (20, 200, 2000, 20000)
    width = 40 if quick else _HEADS
    total = 2 * len(sizes) + len(keys) + 1
    report = on_progress or (lambda what, done, total: None)
    errors: dict[str, Any] = {}
    for i, task in enumerate(("f1", "f2")):
        rows = []
        for j, n in enumerate(sizes):
            report(f"{task} from {n} samples", i * len(sizes) + j, total)
            rows.append(
                {name: [_error(task, name, n, width, seed + s, RIDGES) for s in range(seeds)] for name in _NAMES}
            )
        errors[task] = {name: [row[name] for row in rows] for name in _NAMES}
    needed: dict[str, list[float]] = {"RFA": [], "RFMLP": []}
    for i, n_keys in enumerate(keys):
        report(f"samples for {n_keys} keys", 2 * len(sizes) + i, total)
        for name, found in needed.items():
            found.append(mean(_samples_needed(name, n_keys, seed + s, quick) for s in range(seeds)))
    report("kernel", total - 1, total)
    kernel = [mean(_distance(m, seed + s) for s in range(seeds)) for m in heads]
    tuned = {name: mean(_error("f1", name, sizes[-1], width, seed + s, _WIDE) for s in range(seeds)) for name in _NAMES}
    data = {
        "sizes": sizes,
        "errors": errors,
        "tuned": tuned,
        "keys": keys,
        "needed": needed,
        "monomials": [_quadratics(_SMALL * (n + 1)) for n in keys],
        "heads": heads,
        "kernel": kernel,
    }
    report("done", total, total)
    settings = {
        "d": _DIM,
        "N": _KEYS,
        "heads": width,
        "mu": _MU,
        "draws": seeds,
        "ridges": f"{RIDGES[0]:g}…{RIDGES[-1]:g} on {_HELD_OUT} held-out samples",
        "d of the study of N": _SMALL,
    }
    return Finding(
        name="random-features",
        title="What one attention layer learns, and from how many samples",
        systems=("random-feature-attention-theory",),
        summary=_SUMMARY,
        claims=tuple(_claims(data)),
        settings=settings,
        data=data,
    )


_SUMMARY = """
A layer whose query-key matrices are random and frozen (RFA) is fitted by ridge regression to functions of a query and
a set of keys, all uniform on the unit sphere, and compared with a random two-layer network (RFMLP) of as many features
that reads everything as one vector. BRFA draws the matrices around a multiple of the identity. Errors are of
noise-free test samples, over the target's variance: 1 is the answer of someone who knows only the mean.

f1 = mean of <β, x_i>², a function of the keys alone; f2 = mean of <x_0, x_i>² <β, x_i>, of keys and query together.
For the study of N, the number of samples is raised until the error on f1 falls below one half. A model that does not
know that the keys are a set needs about as many samples as there are quadratic monomials in all (N + 1) d inputs; the
layer's features are averages over keys, so what it needs does not depend on N. Both have 4,000 features there.
"""


def _model(name: str, dim: int, n_keys: int, heads: int, seed: int) -> RandomFeatureModel:
    if name == "RFMLP":
        return RandomFeatureMLP(dim, n_keys, heads * (dim + 1), seed).double()
    return RandomFeatureAttention(dim, heads, mean_scale=_MU if name == "BRFA" else 0.0, seed=seed).double()


def _error(task: str, name: str, n: int, heads: int, seed: int, ridges: Sequence[float]) -> float:
    return _test_error(PermutationInvariantTask(task, _DIM, _KEYS), name, n, heads, seed, ridges)


@torch.no_grad()
def _test_error(
    target: PermutationInvariantTask, name: str, n: int, heads: int, seed: int, ridges: Sequence[float]
) -> float:
    """Over the variance, after fitting n samples; held-out samples choose the ridge, others measure."""
    generator = torch.Generator().manual_seed(seed)
    train, held_out, test = (target.sample(size, generator) for size in (n, _HELD_OUT, _HELD_OUT))
    model = _model(name, target.dim, target.num_keys, heads, seed + 1000)
    model.fit(*train, ridges, held_out)
    return float((model(test.x0, test.keys) - test.y).square().mean() / test.y.var())


def _samples_needed(name: str, n_keys: int, seed: int, quick: bool) -> float:
    """Samples to an error of one half on f1, between the last size above it and the first below, in logarithms."""
    target = PermutationInvariantTask("f1", _SMALL, n_keys)
    last, n = (1, 1.0), 16
    while True:
        error = _test_error(target, name, n, 100 if quick else 800, seed, _WIDE)
        if error < _HALF:
            share = (last[1] - _HALF) / (last[1] - error)
            return float(last[0] * (n / last[0]) ** share)
        last, n = (n, error), round(n * sqrt(2))


def _quadratics(size: int) -> int:
    """Monomials of degree at most two in so many variables."""
    return comb(size + 2, 2)


@torch.no_grad()
def _distance(heads: int, seed: int) -> float:
    """How far the kernel of so many heads, Φ Φᵀ / M, is from the closed form, as a share of it."""
    x0, keys, _ = PermutationInvariantTask("f1", _DIM, _KEYS).sample(8, torch.Generator().manual_seed(seed))
    x = torch.cat([x0[:, None], keys], 1)
    exact = attention_random_kernel(x, x)
    features = RandomFeatureAttention(_DIM, heads, seed=seed).double().features(x0, keys)
    return float((features @ features.T / heads - exact).norm() / exact.norm())


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares in logarithms."""
    a, b = [log(v) for v in x], [log(v) for v in y]
    u, v = mean(a), mean(b)
    return sum((p - u) * (q - v) for p, q in zip(a, b, strict=True)) / sum((p - u) ** 2 for p in a)


def _claims(data: dict[str, Any]) -> list[Claim]:
    n = data["sizes"][-1]
    f1, f2 = ({name: found[-1] for name, found in data["errors"][task].items()} for task in ("f1", "f2"))
    needed, monomials, keys = data["needed"], data["monomials"], data["keys"]
    every = ", ".join(str(k) for k in keys)
    measured = {name: ", ".join(f"{value:.0f}" for value in found) for name, found in needed.items()}
    ratios = [found / want for found, want in zip(needed["RFMLP"], monomials, strict=True)]
    flat, steep = (_slope(keys, needed[name]) for name in ("RFA", "RFMLP"))
    wanted = _slope(keys, monomials)
    rate = _slope(data["heads"], data["kernel"])
    return [
        Claim(
            f"f1 from {n} samples: error / variance of RFA, BRFA, RFMLP",
            "RFA below 0.3 × RFMLP",
            ", ".join(_spread(f1[name]) for name in _NAMES),
            mean(f1["RFA"]) < 0.3 * mean(f1["RFMLP"]),
        ),
        Claim(
            "the same, with ridges up to 10 to choose from",
            "RFA below 0.3 × RFMLP",
            ", ".join(f"{data['tuned'][name]:.3f}" for name in _NAMES),
            data["tuned"]["RFA"] < 0.3 * data["tuned"]["RFMLP"],
        ),
        Claim(
            f"f2 from {n} samples: error / variance of RFA, BRFA, RFMLP",
            "a mean helps with correlations: BRFA below 0.9 × RFA",
            ", ".join(_spread(f2[name]) for name in _NAMES),
            mean(f2["BRFA"]) < 0.9 * mean(f2["RFA"]),
        ),
        Claim(
            f"samples that RFA needs, for N = {every}",
            "the same for every N: exponent 0",
            f"{measured['RFA']}; exponent {flat:.2f}",
            abs(flat) < 0.25,
        ),
        Claim(
            f"samples that RFMLP needs, for N = {every}",
            f"about {', '.join(map(str, monomials))}, the quadratic monomials; exponent {wanted:.2f}",
            f"{measured['RFMLP']}; exponent {steep:.2f}",
            all(0.5 < ratio < 2 for ratio in ratios),
        ),
        Claim(
            f"kernel of {', '.join(map(str, data['heads']))} heads, off the closed form",
            "below 3% with 20,000 heads; falls as M to the power -0.5",
            f"{', '.join(f'{value:.1%}' for value in data['kernel'])}; exponent {rate:.2f}",
            data["kernel"][-1] < 0.03 and abs(rate + 0.5) < 0.2,
        ),
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def draw(finding: Finding) -> "Figure":
    """Errors against samples for both targets, samples against keys, and the kernel against heads."""
    figure: Figure = require("matplotlib.figure", "draw the figure").Figure(figsize=(13, 3.4), layout="constrained")
    first, second, third, fourth = figure.subplots(1, 4)
    data = finding.data
    _errors(first, data, "f1", r"f1: mean of $\langle\beta, x_i\rangle^2$")
    _errors(second, data, "f2", r"f2: mean of $\langle x_0, x_i\rangle^2 \langle\beta, x_i\rangle$")
    first.legend(fontsize=7, loc="lower left")
    for name, found in data["needed"].items():
        third.plot(data["keys"], found, "o-", color=_COLOURS[name])
    third.plot(data["keys"], data["monomials"], ":", color="black", label="quadratic monomials")
    _logarithmic(third, "keys N", "samples to error 0.5", "f1: samples needed")
    third.set_xticks(data["keys"], data["keys"])
    third.set_xticks([], minor=True)
    third.legend(fontsize=8)
    heads, kernel = data["heads"], data["kernel"]
    fourth.plot(heads, kernel, "o-", color=_COLOURS["RFA"])
    fourth.plot(heads, [kernel[0] * sqrt(heads[0] / m) for m in heads], ":", color="black", label=r"$M^{-1/2}$")
    _logarithmic(fourth, "heads M", "relative distance", "kernel of M heads, off its limit")
    fourth.legend(fontsize=8)
    return figure


def _errors(axes: Any, data: Any, task: str, title: str) -> None:
    for name, label in _NAMES.items():
        rows = data["errors"][task][name]
        axes.errorbar(
            data["sizes"], [mean(row) for row in rows], [stdev(row) for row in rows],
            fmt="o-", capsize=2, color=_COLOURS[name], label=f"{name}, {label}",
        )  # fmt: skip
    axes.axhline(1, color="grey", linewidth=0.7)
    _logarithmic(axes, "samples", "error / variance", title)
    axes.set_xticks(data["sizes"], data["sizes"])
    axes.set_xticks([], minor=True)


def _logarithmic(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.2)
