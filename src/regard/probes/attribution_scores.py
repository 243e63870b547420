"""How good a saliency map is: does it point at the object, and does the class hang on what it names?"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.probes.saliency import class_scores, evaluating

_SOFTMAX = partial(torch.softmax, dim=-1)


def pointing_game(maps: Tensor, boxes: Tensor) -> Tensor:
    """Whether the largest value of each map lies on the object (arXiv:1608.00507); the mean is the usual score.

    Where several places share the largest value, their share on the object counts, so that a constant map gets what
    guessing gets.

    Args:
        maps: (B, H, W).
        boxes: (B, 4) top, left, bottom, right in pixels, half-open; or (B, H, W) bool, the pixels of the object.

    Returns:
        (B,) in [0, 1].

    Raises:
        ShapeError: maps and boxes do not fit.
        ArgumentError: a map has a value that is not a number.
    """
    if maps.dim() != 3:
        raise ShapeError(f"maps: expected (B, H, W), got {tuple(maps.shape)}")
    if bool(maps.isnan().any()):
        raise ArgumentError("maps: expected numbers, got some that are not")
    batch, height, width = maps.shape
    if boxes.dtype == torch.bool and boxes.shape == maps.shape:
        inside = boxes
    elif boxes.dtype != torch.bool and boxes.shape == (batch, 4):
        top, left, bottom, right = boxes.to(maps.device)[:, :, None, None].unbind(1)
        y, x = torch.arange(height, device=maps.device)[:, None], torch.arange(width, device=maps.device)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    else:
        expected = f"({batch}, 4) numbers or {tuple(maps.shape)} bool"
        raise ShapeError(f"boxes: expected {expected}, got {tuple(boxes.shape)} {boxes.dtype}")
    largest = maps == maps.amax((1, 2), keepdim=True)
    return (largest & inside).sum((1, 2)) / largest.sum((1, 2))


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What `insertion_deletion` returns.

    Attributes:
        share: (S + 1,) share of the pixels that were changed, from 0 to 1.
        insertion_curve, deletion_curve: (B, S + 1) probability of the class by then.
    """

    share: Tensor
    insertion_curve: Tensor
    deletion_curve: Tensor

    @property
    def insertion(self) -> Tensor:
        """(B,) area under the insertion curve; higher is better."""
        return torch.trapezoid(self.insertion_curve, self.share)

    @property
    def deletion(self) -> Tensor:
        """(B,) area under the deletion curve; lower is better."""
        return torch.trapezoid(self.deletion_curve, self.share)


def insertion_deletion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    steps: int = 32,
    baseline: Tensor | float = 0.0,
    *,
    probability: Callable[[Tensor], Tensor] = _SOFTMAX,
    batch_size: int = 64,
    seed: int = 0,
) -> Perturbation:
    """The probability of a class while pixels come and go, those first that the map ranks highest (arXiv:1806.07421).

    Deletion replaces the picture's pixels by the baseline's, insertion the baseline's by the picture's. Pixels of equal
    rank go in random order. Costs 2 (steps + 1) forwards of every picture.

    Args:
        model: pictures to logits (B, K).
        x: (B, C, H, W). maps: (B, H, W).
        target: the class, one for all or (B,); the most likely one by default.
        steps: number of equal portions, at most H·W.
        baseline: what takes a pixel's place, broadcastable to x: a colour, a blurred picture.
        probability: logits to probabilities (B, K); softmax by default, `torch.sigmoid` for classes that do not
            exclude each other.
        batch_size: forwards at a time.
        seed: of the order of equals.

    Raises:
        ShapeError: x, maps, baseline, target or logits do not fit.
        ArgumentError: steps or batch_size out of range, no such class, or maps that are not numbers.
    """
    if x.dim() != 4:
        raise ShapeError(f"x: expected pictures (B, C, H, W), got {tuple(x.shape)}")
    if maps.shape != (x.shape[0], *x.shape[2:]):
        raise ShapeError(f"maps: expected {(x.shape[0], *x.shape[2:])}, got {tuple(maps.shape)}")
    pixels = maps[0].numel()
    if not 1 <= steps <= pixels or batch_size < 1:
        raise ArgumentError(f"steps and batch_size: expected 1 <= steps <= {pixels}, got {steps} and {batch_size}")
    if bool(maps.isnan().any()):
        raise ArgumentError("maps: expected numbers, got some that are not")
    try:
        other = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    except RuntimeError as error:
        raise ShapeError(f"baseline: expected what broadcasts to {tuple(x.shape)}") from error
    ranks = _ranks(maps, seed)
    counts = [round(pixels * step / steps) for step in range(steps + 1)]
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad(), evaluating(model):
        for picture, blank, rank, wanted in zip(x, other, ranks, _classes(model, x, target), strict=True):
            changed = torch.stack([rank < count for count in counts])[:, None]
            for curve, first, second in zip(curves, (picture, blank), (blank, picture), strict=True):
                inputs = torch.where(changed, first, second)
                logits = torch.cat([model(part) for part in inputs.split(batch_size)])
                curve.append(probability(logits)[:, wanted])
    share = torch.tensor(counts, dtype=x.dtype, device=x.device) / pixels
    return Perturbation(share, *(torch.stack(curve) for curve in curves))


def _ranks(maps: Tensor, seed: int) -> Tensor:
    """(B, H, W) place of every pixel from the highest value down, equals in random order."""
    flat = maps.detach().flatten(1).cpu()
    shuffled = torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    order = shuffled.gather(1, flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
    return order.argsort(1).view(maps.shape).to(maps.device)


def _classes(model: nn.Module, x: Tensor, target: int | Tensor | None) -> Tensor:
    logits = torch.cat([model(one[None]) for one in x])
    class_scores(logits, target, len(x))  # its checks
    chosen = logits.argmax(1) if target is None else torch.as_tensor(target, device=logits.device)
    return chosen.long().expand(len(x))
