"""Rotary embedding of tokens with several coordinates, such as the rows and columns of an image."""

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


def grid_coordinates(*grid: int, device: torch.device | None = None) -> Tensor:
    """(N, axes) coordinates of the tokens of a grid, the last axis running fastest."""
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2)


def axial_angles(coordinates: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`: each axis turns its own pairs of channels, all axes at the same frequencies.

    Args:
        coordinates: (N, axes), any integer or floating type.
        frequencies: (F,) in radians per step.

    Returns:
        Two float32 tensors (N, 2 · axes · F). Channels i and i + axes · F are a pair; the first F pairs belong to the
        first axis. Code that pairs other channels becomes the same by permuting the rows of its query and key weights
        (`pairs_to_halves`), which leaves every score as it is.
    """
    if coordinates.dim() != 2:
        raise ShapeError(f"coordinates: expected (N, axes), got {tuple(coordinates.shape)}")
    angles = (coordinates.to(torch.float32).unsqueeze(-1) * frequencies.to(coordinates.device)).flatten(1)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def pairs_to_halves(weight: Tensor, num_heads: int, axes: int = 1, interleaved: bool = True) -> Tensor:
    """Query or key rows (H · D, ...) of code that rotates other pairs of channels, in the order of `axial_angles`.

    Args:
        weight: of a projection, or its bias; rows head by head.
        num_heads: H.
        axes: each owns a block of D / axes consecutive channels.
        interleaved: pairs inside a block are neighbours (0, 1), (2, 3), …; else first half with second half.

    Raises:
        ArgumentError: the rows are no whole number of pairs.
    """
    rows = weight.shape[0]
    if rows % (2 * axes * num_heads):
        raise ArgumentError(f"weight: {rows} rows are no pairs of {axes} axes in {num_heads} heads")
    shape = (num_heads, axes, -1, 2) if interleaved else (num_heads, axes, 2, -1)
    cut = weight.unflatten(0, shape)
    order = (0, 3, 1, 2) if interleaved else (0, 2, 1, 3)  # (H, half, axis, pair)
    return cut.permute(*order, *range(4, cut.dim())).flatten(0, 3)
