"""Grey pictures of one shape each, as many as wanted."""

from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError


class ShapePictures(NamedTuple):
    """images (B, 1, size, size) in [0, 1], classes (B,) into `SHAPES`, masks (B, size, size) of the shapes."""

    images: Tensor
    classes: Tensor
    masks: Tensor


#: name -> whether a point is inside, of coordinates in which the shape has radius 1
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: x.hypot(y) < 0.9,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.75,
    "triangle": lambda x, y: (y < 0.5) & (y > 1.732 * x.abs() - 1.0),
    "ring": lambda x, y: (x.hypot(y) < 0.95) & (x.hypot(y) > 0.5),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.28) & (torch.maximum(x.abs(), y.abs()) < 0.95),
    "bar": lambda x, y: (x.abs() < 0.95) & (y.abs() < 0.35),
    "corner": lambda x, y: (torch.maximum(x.abs(), y.abs()) < 0.8) & ((x < -0.2) | (y < -0.2)),
    "half": lambda x, y: (x.hypot(y) < 0.95) & (y < 0),
}


def shape_pictures(
    count: int, size: int = 32, noise: float = 0.03, generator: torch.Generator | None = None
) -> ShapePictures:
    """Shapes of any place, turn, radius (a fifth to a third of the picture) and brightness on a plain ground.

    Args:
        count: pictures; classes come at random.
        size: of a side, in pixels; four samples per pixel make soft edges.
        noise: standard deviation of every pixel.
        generator: of everything.

    Raises:
        ArgumentError: no pictures, fewer than 8 pixels, or negative noise.
    """
    if count < 1 or size < 8 or noise < 0:
        raise ArgumentError(f"count, size and noise: expected at least 1, 8 and 0, got {count}, {size} and {noise}")

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    classes = torch.randint(len(SHAPES), (count,), generator=generator)
    radius, turn = draw(0.2, 0.33), draw(0, 2 * pi)
    cx, cy = (radius + (1 - 2 * radius) * torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    figure, contrast = draw(0.1, 0.9), draw(0.3, 0.6)
    ground = torch.where(figure > 0.5, figure - contrast, figure + contrast).clamp(0, 1)
    fine = (torch.arange(2 * size) + 0.5) / (2 * size)
    dx, dy = (fine[None, None, :] - cx) / radius, (fine[None, :, None] - cy) / radius
    x, y = turn.cos() * dx + turn.sin() * dy, turn.cos() * dy - turn.sin() * dx
    inside = torch.stack([shape(x, y) for shape in SHAPES.values()])[classes, torch.arange(count)].float()
    cover = inside.unflatten(2, (size, 2)).unflatten(1, (size, 2)).mean((2, 4))
    images = ground + (figure - ground) * cover + noise * torch.randn(count, size, size, generator=generator)
    return ShapePictures(images.clamp(0, 1)[:, None], classes, cover > 0.5)
