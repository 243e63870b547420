"""Whether activations show what people see: contours not drawn, convex sides, figures (arXiv:2506.00718)."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError

By = Literal["norm", "component"]


def activation_map(tokens: Tensor, grid: tuple[int, int], size: int | tuple[int, int], by: By = "norm") -> Tensor:
    """(B, H, W) in [0, 1]: one number per patch, from the least to the largest of its picture.

    Args:
        tokens: (B, N, C) of the patches, without a class token.
        grid: rows and columns of patches, N in all.
        size: of the map; every pixel has the number of its patch.
        by: "norm", or "component", the first principal component of the picture's tokens, of which it is not known
            which end is up: the sign is that of its correlation with the norm.

    Raises:
        ShapeError: tokens that are not the grid's.
        ArgumentError: another `by`.
    """
    if tokens.dim() != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ShapeError(f"tokens: expected (B, {grid[0] * grid[1]}, C), got {tuple(tokens.shape)}")
    if by not in get_args(By):
        raise ArgumentError(f"by: expected 'norm' or 'component', got {by!r}")
    found = tokens.norm(dim=-1)
    if by == "component":
        centred = tokens - tokens.mean(1, keepdim=True)
        first = torch.linalg.svd(centred, full_matrices=False).Vh[:, :1]  # (B, 1, C)
        along = (centred @ first.mT)[..., 0]
        sign = (along * (found - found.mean(1, keepdim=True))).sum(1, keepdim=True)
        found = torch.where(sign < 0, -along, along)
    low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
    scaled = (found - low) / (high - low).clamp_min(torch.finfo(found.dtype).tiny)
    return F.interpolate(scaled.unflatten(1, grid)[:, None], size, mode="nearest")[:, 0]


def illusory_contour_index(map: Tensor, edge: Tensor, control: Tensor) -> float:
    """(mean on the contour - mean on the controls) / standard deviation of the controls.

    Compare with the index of the same picture with its inducers turned away, where there is no contour.

    Args:
        map: (H, W).
        edge, control: (H, W) bool, as in `regard.tasks.gestalt.kanizsa_stimulus`.

    Raises:
        ShapeError: shapes that differ.
        ArgumentError: no contour, fewer than two control positions, or controls that are all alike.
    """
    _same(map, edge=edge, control=control)
    if not edge.any() or control.sum() < 2:
        raise ArgumentError(f"edge and control: expected 1 and 2 positions, got {edge.sum()} and {control.sum()}")
    controls = map[control].double()
    spread = controls.std()
    if spread == 0:
        raise ArgumentError("map: the control positions are all alike")
    return float((map[edge].double().mean() - controls.mean()) / spread)


def convexity_index(maps: Tensor, convex: Tensor, concave: Tensor) -> float:
    """The share of pictures whose convex side is stronger in the mean; equal ones count one half.

    Args:
        maps: (P, H, W).
        convex, concave: (P, H, W) bool.

    Raises:
        ShapeError: shapes that differ.
        ArgumentError: a picture without one of the sides.
    """
    _same(maps, convex=convex, concave=concave)
    first, second = (_means(maps, mask) for mask in (convex, concave))
    return float(((first > second).double() + 0.5 * (first == second).double()).mean())


def figure_ground_auc(map: Tensor, mask: Tensor) -> float:
    """The chance that a pixel of the figure is above one of the ground, with equal ones one half: the area under ROC.

    Args:
        map: of any shape.
        mask: the same, True on the figure.

    Raises:
        ShapeError: shapes that differ.
        ArgumentError: no figure or no ground.
    """
    _same(map, mask=mask)
    inside = int(mask.sum())
    outside = mask.numel() - inside
    if not inside or not outside:
        raise ArgumentError(f"mask: expected figure and ground, got {inside} and {outside} pixels")
    _, place, counts = map.flatten().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2  # mean rank, from 1, of equal values
    total = float(ranks[place][mask.flatten()].sum())
    return (total - inside * (inside + 1) / 2) / (inside * outside)


def _means(maps: Tensor, masks: Tensor) -> Tensor:
    counts = masks.flatten(1).sum(1)
    if not counts.all():
        raise ArgumentError("convex and concave: expected both in every picture")
    return (maps * masks).flatten(1).double().sum(1) / counts


def _same(map: Tensor, **masks: Tensor) -> None:
    for name, mask in masks.items():
        if mask.shape != map.shape or mask.dtype != torch.bool:
            raise ShapeError(f"{name}: expected bool {tuple(map.shape)}, got {mask.dtype} {tuple(mask.shape)}")
