"""Which heads to calibrate (arXiv:2406.15765): those whose calibration alone makes a model better at something."""

from collections.abc import Callable, Sequence

from torch import nn

from regard.errors import ArgumentError
from regard.methods.language.act.calibration import Threshold
from regard.methods.language.act.method import ACT, num_heads
from regard.sites import apply, find_sites

#: a score of the model as it is now, more is better; or several, of which the mean counts
Evaluate = Callable[[nn.Module], float | Sequence[float]]
Head = tuple[int, int]


def search_heads(
    model: nn.Module,
    evaluate: Evaluate,
    layers: Sequence[int] | None = None,
    *,
    heads: Sequence[Head] | None = None,
    beta: float = 0.4,
    threshold: Threshold = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, list[int]]:
    """The heads whose calibration alone raises `evaluate`, by layer, as `ACT` takes them; see `head_gains`."""
    gains = head_gains(model, evaluate, layers, heads=heads, beta=beta, threshold=threshold, on_progress=on_progress)
    return by_layer([head for head, gain in gains.items() if gain > 0])


def head_gains(
    model: nn.Module,
    evaluate: Evaluate,
    layers: Sequence[int] | None = None,
    *,
    heads: Sequence[Head] | None = None,
    beta: float = 0.4,
    threshold: Threshold = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Head, float]:
    """By (layer, head), what calibrating that head alone adds to the score of the unmodified model.

    One evaluation more than there are heads to try.

    Args:
        evaluate: called with the model; a score, or one per task, whose mean counts.
        layers: where to look; by default all but the first two and the last, as in the paper.
        heads: (layer, head) pairs to try in place of every head of the layers.
        beta, threshold: as in `ACT`.
        on_progress: called with evaluations done and their number.

    Raises:
        ArgumentError: a layer or head that is not there, nothing to try, or beta or threshold out of range.
    """
    ACT(beta=beta, threshold=threshold)
    sites = {site.index: site for site in find_sites(model)}
    if heads is None:
        layers = list(range(2, len(sites) - 1)) if layers is None else list(layers)
        if not layers or not set(layers) <= set(sites):
            raise ArgumentError(f"layers: expected some of 0..{len(sites) - 1}, got {layers}")
        heads = [(layer, head) for layer in layers for head in range(num_heads(sites[layer]))]
    elif layers is not None or not heads:
        raise ArgumentError(f"heads: expected (layer, head) pairs in place of layers, got {heads!r} with {layers!r}")
    before, gains = _mean(evaluate(model)), {}
    for done, (layer, head) in enumerate(heads):
        if on_progress is not None:
            on_progress(done + 1, len(heads) + 1)
        with apply(model, ACT(only_heads={layer: [head]}, beta=beta, threshold=threshold)):
            gains[layer, head] = _mean(evaluate(model)) - before
    if on_progress is not None:
        on_progress(len(heads) + 1, len(heads) + 1)
    return gains


def by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """(layer, head) pairs as `ACT` takes them."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found


def _mean(scores: float | Sequence[float]) -> float:
    return float(scores) if isinstance(scores, int | float) else sum(scores) / len(scores)
