"""OverLoCK: the plug-and-play block with its gradient, and the backbone.

Tolerances are relative to the output's scale.
"""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

RELATIVE = 1e-4


def check(golden: Golden) -> Iterable[Comparison]:
    x = golden.inputs["x"]

    def compare(name: str, got: torch.Tensor) -> Comparison:
        return golden.compare(name, got, RELATIVE * golden.outputs[name].abs().max().item())

    if "dim" in golden.kwargs:
        block = regard.from_official("overlock", golden.state(), variant="block", **golden.kwargs).eval()
        x = x.requires_grad_()
        y = block(x.movedim(1, -1)).movedim(-1, 1)
        yield compare("y", y)
        yield compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0])
    else:
        model = regard.from_official("overlock", golden.state(), **golden.kwargs).eval()
        yield compare("logits", model(x))
