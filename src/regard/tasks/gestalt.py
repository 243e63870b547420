"""Pictures in which people see more than is drawn: illusory squares, convex sides, figures on a ground."""

from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError


class Kanizsa(NamedTuple):
    """image (1, size, size), black inducers on white; edge and control (size, size) bool, where to look."""

    image: Tensor
    edge: Tensor
    control: Tensor


class Sides(NamedTuple):
    """image (1, size, size); convex and concave (size, size) bool, the two kinds of regions."""

    image: Tensor
    convex: Tensor
    concave: Tensor


class Figure(NamedTuple):
    """image (1, size, size); mask (size, size) bool, the figure."""

    image: Tensor
    mask: Tensor


def kanizsa_stimulus(size: int = 224, radius: float = 24, side: float = 100, illusory: bool = True) -> Kanizsa:
    """Four discs, each with a quarter cut out, at the corners of a square that is not drawn.

    The contour is where the square's sides run between the discs, one pixel to each side. Its controls lie as far from
    the same disc, on the other side of it: the sides continued outwards.

    Args:
        size: of the picture's sides.
        radius: of the discs.
        side: of the square.
        illusory: False turns every disc by half a turn, and there is no square to see.

    Raises:
        ArgumentError: discs that touch, or controls outside the picture.
    """
    if not (0 < 2 * (radius + 2) < side and 2 * side <= size):
        raise ArgumentError(
            f"size, radius and side: expected 2 (radius + 2) < side <= size / 2, got {size}, {radius} and {side}"
        )
    y, x = _centred(size)
    # by symmetry everything is said in one quadrant, with the disc around (side / 2, side / 2)
    u, v = x.abs() - side / 2, y.abs() - side / 2
    disc = u.hypot(v) <= radius
    mouth = (u < 0) & (v < 0) if illusory else (u > 0) & (v > 0)
    white = torch.where(disc & ~mouth, 0.0, 1.0)
    edge, control = torch.zeros_like(disc), torch.zeros_like(disc)
    for along, across in ((u, v), (v, u)):
        line, far = across.abs() <= 1, along.abs() >= radius + 2
        edge |= line & far & (along < 0)
        control |= line & far & (along > 0) & (along <= side / 2)
    return Kanizsa(white[None], edge, control)


def convexity_stimulus(size: int = 224, regions: int = 6, dark: bool = True) -> Sides:
    """Columns side by side, every other with borders that bulge outwards; the ones between have the same borders.

    Args:
        size: of the picture's sides.
        regions: columns, at least 3.
        dark: whether the convex ones are black; use both, so that brightness says nothing.

    Raises:
        ArgumentError: too few columns, or of fewer than 8 pixels.
    """
    if regions < 3 or size < 8 * regions:
        raise ArgumentError(f"regions: expected 3 to size / 8 = {size // 8}, got {regions}")
    y, x = _centred(size)
    width = size / regions
    bulge = 0.35 * width * (1 - (2 * ((y + size / 2) / width % 1) - 1) ** 2).sqrt()  # arcs, one under the other
    place = x + size / 2
    # the distance to the middle of the nearest convex column, those of even number
    middle = ((place / width) // 2) * 2 * width + width / 2
    nearest = torch.minimum((place - middle).abs(), (place - middle - 2 * width).abs())
    convex = nearest < width / 2 - 0.2 * width + bulge
    return Sides(torch.where(convex == dark, 0.0, 1.0)[None], convex, ~convex)


def figure_ground_stimulus(size: int = 224, generator: torch.Generator | None = None) -> Figure:
    """A smooth closed shape of one random grating on another; brightness is the same on both.

    Args:
        size: of the picture's sides.
        generator: of shape and gratings.

    Raises:
        ArgumentError: fewer than 16 pixels.
    """
    if size < 16:
        raise ArgumentError(f"size: expected at least 16, got {size}")
    y, x = _centred(size)
    angle = torch.atan2(y, x)
    border = torch.full_like(x, 0.27 * size)
    for order in (2, 3, 4):
        amplitude, phase = torch.rand(2, generator=generator)
        border = border + 0.05 * size * amplitude * torch.cos(order * angle + 2 * pi * phase)
    mask = x.hypot(y) < border
    turn = pi * torch.rand((), generator=generator)
    gratings: list[Tensor] = []
    for direction in (turn, turn + pi / 2):
        phase = 2 * pi * torch.rand((), generator=generator)
        along = x * direction.cos() + y * direction.sin()
        gratings.append(0.5 + 0.5 * torch.cos(2 * pi * along / (size / 28) + phase))
    return Figure(torch.where(mask, gratings[0], gratings[1])[None], mask)


def _centred(size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of pixels, from the middle of the picture."""
    at = torch.arange(size) - (size - 1) / 2
    return at[:, None].expand(size, size), at[None, :].expand(size, size)
