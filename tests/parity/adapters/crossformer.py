"""CrossFormer: blocks with short and long distance attention and their gradients, and the network."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("crossformer", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    for name, kwargs in golden.kwargs.items():
        block = regard.from_official("crossformer", golden.state(f"{name}."), variant="block", **kwargs).eval()
        x = golden.inputs[f"{name}.x"].clone().requires_grad_()
        y = block(x.unflatten(1, tuple(kwargs["input_resolution"]))).flatten(1, 2)
        yield golden.compare(f"{name}.y", y, ATOL)
        yield golden.compare(f"grad/in/{name}.x", torch.autograd.grad(y.sum(), x)[0], ATOL)
