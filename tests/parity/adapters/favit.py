"""FaViT: factorization self-attention with its gradient, and the network."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("favit", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    layer = regard.from_official("favit", golden.state(), variant="attention", **golden.kwargs)
    x = golden.inputs["x"].requires_grad_()
    grid = int(golden.inputs["H"]), int(golden.inputs["W"])
    y = layer(x.unflatten(1, grid)).flatten(1, 2)
    yield golden.compare("y", y, 1e-5)
    yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], 1e-5)
