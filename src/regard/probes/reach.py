"""How far one position of a grid sees: the effective receptive field (arXiv:1701.04128)."""

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError


def reach(module: nn.Module, x: Tensor, query: tuple[int, int], *, directions: int = 8) -> Tensor:
    """How much the output at one position depends on the input at each, at the input x.

        reach_{hw} = (Σ_c (∂ r·y_query / ∂x_{hwc})²)^½, its root mean square over random unit directions r

    It is 0 exactly where the input has no influence, whatever carries the influence: attention, convolution, spectra.

    Args:
        module: maps (1, H, W, C) to (1, H', W', C').
        x: (1, H, W, C).
        query: row and column of the output.
        directions: how many r; C' and more give no better estimate.

    Returns:
        (H, W), not negative.

    Raises:
        ShapeError: x or the output is not one grid.
        ArgumentError: the query lies outside of the output.
    """
    if x.dim() != 4 or x.shape[0] != 1:
        raise ShapeError(f"x: expected (1, H, W, C), got {tuple(x.shape)}")
    x = x.detach().requires_grad_()
    y = module(x)
    if y.dim() != 4:
        raise ShapeError(f"module: expected a grid (1, H, W, C) as its output, got {tuple(y.shape)}")
    if not all(0 <= at < size for at, size in zip(query, y.shape[1:3], strict=True)):
        raise ArgumentError(f"query: {query} is outside of the output's grid {tuple(y.shape[1:3])}")
    squares = x.new_zeros(x.shape[1:3])
    for _ in range(directions):
        r = torch.nn.functional.normalize(torch.randn_like(y[0, 0, 0]), dim=0)
        (gradient,) = torch.autograd.grad(y[0, query[0], query[1]] @ r, x, retain_graph=True)
        squares += gradient[0].square().sum(-1)
    return (squares / directions).sqrt()
