"""DiNAT: the attention layer with its gradient (`dinat-attention`), and the network (`dinat`)."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("dinat", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    layer = regard.from_official("dinat", golden.state(), variant="attention", **golden.kwargs)
    x = golden.inputs["x"].requires_grad_()
    y = layer(x)
    yield golden.compare("y", y, 1e-5)
    yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], 1e-5)
