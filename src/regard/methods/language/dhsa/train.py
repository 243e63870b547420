"""Train a boundary predictor for a model, from labels the model makes itself.

    predictor = train_predictor(model, texts, BoundarySimilarityAttn(channel_in=192, d_h=32))
    save_predictor(predictor, "boundaries.safetensors", {"channel_in": 192, "d_h": 32})

The model stays as it is. It reads every text once; `mass_ratio` says where the attention that its keys receive changes,
and the predictor learns to see that in the keys alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.methods.language.dhsa.boundaries import key_features, mass_ratio
from regard.methods.language.dhsa.losses import focal_bce, soft_label
from regard.methods.language.dhsa.predictor import BoundaryPredictor
from regard.sites import Call, Method, apply


@dataclass(frozen=True)
class Example:
    """One layer's reading of one text: `features` (1, C, L) and labels `ratio` (1, L), 0 where there is none."""

    features: Tensor
    ratio: Tensor


@dataclass(kw_only=True)
class _Labels(Method):
    """Observes the attention of whole texts."""

    name: ClassVar[str] = "dhsa-labels"
    window_size: int
    found: list[Example] = field(default_factory=list)

    def after(self, call: Call) -> None:
        ratio = mass_ratio(call.query, call.key, self.window_size, mask=call.mask, scale=call.scale, smooth_ends=True)
        self.found.append(Example(key_features(call.key), ratio.float()))


@torch.no_grad()
def examples(
    model: nn.Module, texts: Sequence[Tensor], window_size: int = 4, layers: Sequence[int] | None = None
) -> list[Example]:
    """Features and labels of every layer (or those in `layers`) for each text of token ids (1, L)."""
    labels = _Labels(window_size=window_size, layers=layers)
    with apply(model, labels):
        for text in texts:
            model(text, use_cache=False, logits_to_keep=1)
    return labels.found


def train_predictor(
    predictor: BoundaryPredictor,
    data: Sequence[Example],
    *,
    epochs: int = 2,
    lr: float = 1e-4,
    alpha: float = 4.0,
    beta: float = 0.0,
    gamma: float = 2.0,
    pos_weight: float | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> BoundaryPredictor:
    """Train `predictor` in place with the published recipe (focal BCE on soft labels, Adam); returns it in eval mode.

    Args:
        data: from `examples`; one step is one example.
        alpha, beta: of `soft_label`. gamma, pos_weight: of `focal_bce`.
        progress: called after each epoch with its number and mean loss.
    """
    if not data:
        raise ArgumentError("data: expected at least one example, got none")
    weight = None if pos_weight is None else torch.tensor(pos_weight)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    predictor.train().requires_grad_(True)
    for epoch in range(epochs):
        total = 0.0
        for i in torch.randperm(len(data), generator=generator).tolist():
            features, ratio = data[i].features, data[i].ratio
            logits = predictor(features)
            loss = focal_bce(logits, soft_label(ratio.clamp(min=1), alpha, beta), ratio > 0, gamma, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if progress is not None:
            progress(epoch, total / len(data))
    return predictor.eval().requires_grad_(False)


def boundary_f1(predicted: Sequence[int], true: Sequence[int], tolerance: int = 2) -> float:
    """F1 of predicted against true boundaries, 0 and L left out; one counts as found within `tolerance` tokens."""
    predicted, true = predicted[1:-1], true[1:-1]
    if not predicted or not true:
        return 0.0
    precise = sum(any(abs(p - t) <= tolerance for t in true) for p in predicted) / len(predicted)
    recalled = sum(any(abs(p - t) <= tolerance for p in predicted) for t in true) / len(true)
    return 2 * precise * recalled / (precise + recalled) if precise + recalled else 0.0
