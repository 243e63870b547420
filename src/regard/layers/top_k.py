"""Winners over positions: of each channel only the largest activations of a picture stay."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers.hooks import modules_named

By = Literal["value", "abs"]


class TopKSpatial(nn.Module):
    """Keep, for each channel, the share p of positions that are largest; the others become 0 (arXiv:2506.00718).

        t = the value of rank ⌈p N⌉ among the N positions,   y = x where x >= t, else 0

    (B, C, H, W), or tokens (B, N, C), to the same. Several values equal to t are all kept, so p = 1 changes nothing and
    neither does a constant. What is kept has its gradient, what is not has none.

    Args:
        p: share of positions, above 0 and at most 1.
        by: "value", or "abs" for the largest magnitudes.
        exempt_cls: of tokens, whether the first one is no position and stays as it is; or how many.

    Raises:
        ArgumentError: a NaN in the input.
        ShapeError: neither a picture nor tokens, or no position.
    """

    def __init__(self, p: float, by: By = "value", exempt_cls: bool | int = True):
        super().__init__()
        if not 0 < p <= 1:
            raise ArgumentError(f"p: expected a share above 0 and at most 1, got {p}")
        if by not in get_args(By):
            raise ArgumentError(f"by: expected 'value' or 'abs', got {by!r}")
        if exempt_cls < 0:
            raise ArgumentError(f"exempt_cls: expected a bool or at least 0, got {exempt_cls}")
        self.p, self.by, self.exempt_cls = p, by, exempt_cls

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self._winners(x.flatten(2), 2).reshape(x.shape)
        if x.dim() != 3:
            raise ShapeError(f"x: expected (B, C, H, W) or (B, N, C), got {tuple(x.shape)}")
        first = int(self.exempt_cls)
        return torch.cat([x[:, :first], self._winners(x[:, first:], 1)], 1)

    def _winners(self, x: Tensor, dim: int) -> Tensor:
        n = x.shape[dim]
        if n == 0:
            raise ShapeError(f"x: expected at least one position, got {tuple(x.shape)}")
        if x.isnan().any():
            raise ArgumentError("x: expected numbers, got NaN")
        rank = x.abs() if self.by == "abs" else x
        # an ulp above a whole number is no position more
        threshold = rank.topk(max(1, ceil(self.p * n - 1e-9)), dim).values.amin(dim, keepdim=True)
        return torch.where(rank >= threshold, x, 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}, by={self.by!r}, exempt_cls={self.exempt_cls}"


@contextmanager
def apply_topk(
    model: nn.Module, layer_names: Sequence[str], p: float, by: By = "value", exempt_cls: bool | int = True
) -> Iterator[nn.Module]:
    """Put `TopKSpatial` behind the named layers inside the ``with`` block, at inference or while fine-tuning.

        with apply_topk(model, ["blocks.10.mlp.act"], p=0.2):
            model(x)

    Args:
        model: any module; of layers that give a tuple the first entry is changed.
        layer_names: as in ``model.named_modules()``: of a transformer, activations of MLPs or whole blocks.
        p, by, exempt_cls: see `TopKSpatial`.

    Raises:
        ArgumentError: a name that the model does not have, or bad arguments.
        Unsupported: a layer that gives no tensor.
    """
    top_k = TopKSpatial(p, by, exempt_cls)

    def hook(module: nn.Module, inputs: object, output: object) -> object:
        if isinstance(output, Tensor):
            return top_k(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (top_k(output[0]), *output[1:])
        raise Unsupported(f"layer_names: expected layers that give a tensor, got a {type(output).__name__}")

    handles = [module.register_forward_hook(hook) for module in modules_named(model, layer_names)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
