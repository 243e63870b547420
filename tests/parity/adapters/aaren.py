"""Aaren: torch's own multi-head attention with a learned query on every prefix."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    # The oracle is in float64 and stored in float32, which at the size of y_large is a grain of 3e-5.
    layer = regard.from_official("aaren", golden.state(), **golden.kwargs).double()
    x = golden.inputs["x"].double().requires_grad_()
    y, state = layer.stream(x)
    yield golden.compare("y", y, atol=ATOL)
    yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], atol=ATOL)
    # the peak is a running maximum here as there, so the sums are relative to the same number
    for name, part in zip("mca", state, strict=True):
        yield golden.compare(f"state_{name}", part, atol=ATOL)
    yield golden.compare("y_large", layer(golden.inputs["x_large"].double()).float(), atol=ATOL)
