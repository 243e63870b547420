"""Odd one out: a picture between two with its local statistics and none of its arrangement (arXiv:2506.00718)."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers.hooks import captured
from regard.tasks.disrt_stimuli import read_stimuli

Pool = Literal["mean", "cls", "all"]
#: pictures (B, C, H, W) and names of layers to features (B, D) by layer
FeatureFn = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
CHANCE = 1 / 3


class Accuracy(NamedTuple):
    """accuracy of so many trials, and Wilson's 95% interval of it, low to high; chance is 1/3."""

    accuracy: float
    low: float
    high: float
    trials: int

    def __str__(self) -> str:
        return f"{self.accuracy:.0%} ({self.low:.0%}–{self.high:.0%})"


def oddity(features: Tensor, seed: int = 0) -> Tensor:
    """(T,) which of the three is least like the other two: argmin_a Σ_{b≠a} cos(φ_a, φ_b).

    Of equal ones the first in an order that `seed` draws for every trial.

    Args:
        features: (T, 3, D).

    Raises:
        ShapeError: other dimensions.
    """
    if features.dim() != 3 or features.shape[1] != 3:
        raise ShapeError(f"features: expected (T, 3, D), got {tuple(features.shape)}")
    unit = F.normalize(features.double(), dim=-1)
    total = (unit @ unit.mT).sum(-1) - 1  # a vector's cosine with itself
    order = torch.rand(total.shape, generator=torch.Generator().manual_seed(seed)).argsort(1).to(total.device)
    # of equal sums that differ by rounding, none may be first because of it
    shown = total.gather(1, order)
    first = (shown <= shown.amin(1, keepdim=True) + 1e-12).double().argmax(1, keepdim=True)
    return order.gather(1, first)[:, 0]


def binomial_interval(hits: int, trials: int) -> Accuracy:
    """Wilson's interval at 95%.

    Raises:
        ArgumentError: no trials, or more hits than trials.
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ArgumentError(f"hits and trials: expected 0 <= hits <= trials, at least one trial, got {hits}, {trials}")
    z, share = 1.959964, hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Accuracy(share, max(0.0, middle - half), min(1.0, middle + half), trials)


class DiSRT:
    """Trials of an original I and two distorted versions: is I, the one with another arrangement, found to be odd?

        trials = DiSRT(torch.stack([originals, first, second], 1))
        trials.evaluate(layer_features(model), ["blocks.5", "blocks.11"])

    Args:
        stimuli: (T, 3, C, H, W), the original first; or the folder, or manifest, that `write_stimuli` made.

    Raises:
        ShapeError: stimuli of another shape.
        ArgumentError: a file that is no manifest.
    """

    def __init__(self, stimuli: Tensor | str | Path):
        self.triples = stimuli if isinstance(stimuli, Tensor) else read_stimuli(stimuli)
        if self.triples.dim() != 5 or self.triples.shape[1] != 3 or not len(self.triples):
            raise ShapeError(f"stimuli: expected (T, 3, C, H, W), got {tuple(self.triples.shape)}")

    @torch.no_grad()
    def evaluate(
        self,
        feature_fn: FeatureFn,
        layers: Sequence[str],
        seed: int = 0,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Accuracy]:
        """How often the original was found, by layer. `best` names the best layer.

        Args:
            feature_fn: from pictures (B, C, H, W) and the layers to features (B, D) by layer; see `layer_features`.
            layers: names that it knows.
            seed: of ties.
            batch_size: trials at a time; their three pictures are prepared alike, in one batch.
            on_progress: called with the trials done and their number.

        Raises:
            ShapeError: features that are not (B, D).
        """
        found: dict[str, list[Tensor]] = {name: [] for name in layers}
        for batch in self.triples.split(batch_size):
            features = feature_fn(batch.flatten(0, 1), layers)
            for name in layers:
                given = features[name]
                if given.dim() != 2 or given.shape[0] != 3 * len(batch):
                    raise ShapeError(
                        f"feature_fn: expected ({3 * len(batch)}, D) of {name!r}, got {tuple(given.shape)}"
                    )
                found[name].append(given.unflatten(0, (-1, 3)).cpu())
            if on_progress is not None:
                on_progress(sum(map(len, found[layers[0]])), len(self.triples))
        odd = {name: oddity(torch.cat(given), seed) for name, given in found.items()}
        return {name: binomial_interval(int((which == 0).sum()), len(which)) for name, which in odd.items()}


def best(accuracies: Mapping[str, Accuracy]) -> str:
    """The layer of the highest accuracy, the first of equal ones."""
    return max(accuracies, key=lambda name: accuracies[name].accuracy)


def layer_features(model: nn.Module, pool: Pool = "mean", prefix_tokens: int = 1) -> FeatureFn:
    """Features of named layers of any module that takes pictures.

    Args:
        model: in eval mode, if that matters.
        pool: of maps (B, C, H, W), or tokens (B, N, C) after their first `prefix_tokens`: "mean" over positions, "cls"
            the first token, or "all" of a map as one vector. Layers that give (B, D) are taken as they are.
        prefix_tokens: class token and registers.

    Raises:
        ArgumentError: another pool, or "cls" of a map.
    """
    if pool not in get_args(Pool):
        raise ArgumentError(f"pool: expected 'mean', 'cls' or 'all', got {pool!r}")

    def features(images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        with captured(model, layers) as outputs:
            model(images)
        return {name: _pooled(outputs[name], pool, prefix_tokens) for name in layers}

    return features


def _pooled(x: Tensor, pool: Pool, prefix_tokens: int) -> Tensor:
    if x.dim() == 2:
        return x
    if x.dim() not in (3, 4):
        raise ShapeError(f"layers: expected outputs (B, C, H, W), (B, N, C) or (B, D), got {tuple(x.shape)}")
    if pool == "cls":
        if x.dim() == 4:
            raise ArgumentError(f"pool: a map {tuple(x.shape)} has no class token")
        return x[:, 0]
    positions = x.flatten(2).mT if x.dim() == 4 else x[:, prefix_tokens:]
    return positions.mean(1) if pool == "mean" else positions.flatten(1)


def local_statistics(images: Tensor, patch: int = 1) -> Tensor:
    """(B, D) means and covariances of all patches of a picture: what a bag of small pieces knows.

    Args:
        images: (B, C, H, W).
        patch: side of the pieces; 1 gives those of the channels.
    """
    pieces = F.unfold(images, patch)
    mean = pieces.mean(2)
    centred = pieces - mean[..., None]
    covariance = centred @ centred.mT / pieces.shape[2]
    upper = torch.triu_indices(covariance.shape[1], covariance.shape[1])
    return torch.cat([mean, covariance[:, upper[0], upper[1]]], 1)
