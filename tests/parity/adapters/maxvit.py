"""MaxViT: its block and grid layers with gradients, and the network."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("maxvit", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    for kind in sorted({name.partition(".")[0] for name in golden.outputs if not name.startswith("grad/")}):
        layer = regard.from_official(
            "maxvit", golden.state(f"{kind}."), variant="layer", partition_type=kind, **golden.kwargs
        )
        name = f"{kind}.x" if f"{kind}.x" in golden.inputs else "x"
        x = golden.inputs[name].clone().requires_grad_()
        y = layer(x)
        yield golden.compare(f"{kind}.y", y, ATOL)
        yield golden.compare(f"grad/in/{kind}.x", torch.autograd.grad(y.sum(), x)[0], ATOL)
