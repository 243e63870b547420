"""Pictures of one or two objects of different classes, with their boxes: does a map point at the right one?"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.tasks.sequence import Split, generator

#: what the classes look like: a shape and what fills it
KINDS = ("disc", "ring", "striped square", "checked diamond", "cross", "triangle")


class ObjectBatch(NamedTuple):
    """images (B, 3, size, size) float32, labels (B, K) bool: which classes are there; and of the two halves, left and
    right: classes (B, 2), -1 where it is empty, and boxes (B, 2, 4) as top, left, bottom, right, half-open."""

    images: Tensor
    labels: Tensor
    classes: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Objects:
    """Coloured objects on a cloudy background, one in the left half and one in the right, of different classes.

    Colour, brightness, size, turn and place say nothing about the class. A network is asked which classes there are,
    each for itself, as on the photos on which saliency is usually judged (arXiv:2004.02866 uses VOC and COCO).

    Args:
        size: of the pictures in pixels, even.
        sides: smallest and largest side of an object in pixels.
        single: share of the pictures that show only one.
    """

    size: int = 32
    sides: tuple[int, int] = (11, 15)
    single: float = 0.0
    num_classes: ClassVar[int] = len(KINDS)

    def __post_init__(self) -> None:
        if self.size % 2 or not 4 <= self.sides[0] <= self.sides[1] <= self.size // 2:
            raise ArgumentError(
                f"size and sides: expected an even size and 4 <= sides <= size / 2, got {self.size} and {self.sides}"
            )
        if not 0 <= self.single <= 1:
            raise ArgumentError(f"single: expected a share, got {self.single}")

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> ObjectBatch:
        """The same arguments always give the same pictures."""
        g = generator(split, index, seed)
        images = self._background(batch_size, g)
        classes = torch.rand(batch_size, self.num_classes, generator=g).argsort(1)[:, :2]
        lonely = torch.rand(batch_size, generator=g) < self.single
        classes[lonely, torch.randint(2, (int(lonely.sum()),), generator=g)] = -1
        sides = torch.randint(self.sides[0], self.sides[1] + 1, (batch_size, 2), generator=g)
        free = torch.stack([self.size - sides, self.size // 2 - sides], -1)  # rows, columns
        corners = (torch.rand(batch_size, 2, 2, generator=g) * (free + 1)).floor().long()
        corners[:, 1, 1] += self.size // 2
        for half in range(2):
            inside, shade = self._object(classes[:, half], corners[:, half], sides[:, half], g)
            colour = 0.25 + 0.75 * torch.rand(batch_size, 3, 1, 1, generator=g)
            images = torch.where(inside[:, None], colour * shade[:, None], images)
        labels = torch.zeros(batch_size, self.num_classes + 1, dtype=torch.bool).scatter_(1, classes + 1, True)[:, 1:]
        return ObjectBatch(images, labels, classes, torch.cat([corners, corners + sides[..., None]], -1))

    def _background(self, count: int, g: torch.Generator) -> Tensor:
        clouds = torch.rand(count, 3, 6, 6, generator=g)
        smooth = F.interpolate(clouds, (self.size, self.size), mode="bilinear")
        return 0.45 * smooth + 0.1 * torch.rand(count, 3, self.size, self.size, generator=g)

    def _object(self, kind: Tensor, corner: Tensor, side: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, size, size) which pixels it covers, and how bright they are."""
        at = torch.arange(self.size) + 0.5
        y, x = (2 * (at - corner[:, i, None]) / side[:, None] - 1 for i in range(2))  # -1 to 1 over the box
        y, x = torch.broadcast_tensors(y[:, :, None], x[:, None])
        box = (y.abs() < 1) & (x.abs() < 1)
        angle = (0.5 * torch.rand(len(kind), generator=g) - 0.25)[:, None, None]
        y, x = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
        radius, widest = torch.hypot(y, x), torch.maximum(y.abs(), x.abs())
        shapes = {
            "disc": radius < 0.95,
            "ring": (radius < 0.95) & (radius > 0.5),
            "striped square": widest < 0.8,
            "checked diamond": y.abs() + x.abs() < 0.98,
            "cross": (torch.minimum(y.abs(), x.abs()) < 0.28) & (widest < 0.9),
            "triangle": (y < 0.75) & (x.abs() < (y + 0.95) * 0.5),
        }
        stripes, checks = torch.sin(9 * y) > 0, (torch.sin(8 * y) > 0) ^ (torch.sin(8 * x) > 0)
        inside, shade = torch.zeros_like(box), torch.ones_like(y)
        for i, name in enumerate(KINDS):
            chosen = (kind == i)[:, None, None]
            inside = inside | (chosen & shapes[name])
            dark = stripes if name.startswith("striped") else checks if name.startswith("checked") else None
            if dark is not None:
                shade = torch.where(chosen & dark, 0.15, shade)
        return inside & box, shade
