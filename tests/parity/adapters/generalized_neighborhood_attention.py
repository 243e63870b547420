"""Generalized neighborhood attention: NATTEN's masks, and attention under them with its gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regard import masks
from regard.mechanisms.grid.neighborhood import neighborhood_attention
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    for case, kwargs in golden.kwargs.items():
        grid: Any = kwargs["shape"]
        window = (kwargs["window_size"], kwargs["dilation"], kwargs["stride"], kwargs["is_causal"])
        mask = masks.neighborhood(grid, *window).dense(golden.inputs[f"{case}.query"].shape[2])
        yield golden.compare(f"{case}.mask", mask.to(golden.outputs[f"{case}.mask"].dtype), 0.0)
        given = {name: golden.inputs[f"{case}.{name}"].requires_grad_() for name in ("query", "key", "value")}

        def on_grid(t: Tensor, grid: Any = grid) -> Tensor:
            return t.transpose(1, 2).unflatten(1, grid)

        y = neighborhood_attention(*(on_grid(t) for t in given.values()), *window, backend="tiles")
        y = y.flatten(1, -3).transpose(1, 2)
        yield golden.compare(f"{case}.y", y, ATOL)
        wanted = [name for name in given if f"grad/in/{case}.{name}" in golden.outputs]
        for name, grad in zip(wanted, torch.autograd.grad(y.sum(), [given[n] for n in wanted]), strict=True):
            yield golden.compare(f"grad/in/{case}.{name}", grad, ATOL)
