"""MoH: the published layers for diffusion transformers, with every mix of heads, and for Llama."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    for name, kwargs in golden.kwargs.items():
        variant = "llama" if name.startswith("llama") else "dit-attention"
        layer = regard.from_official("moh", golden.state(f"{name}."), variant=variant, **kwargs).eval()
        x = golden.inputs[f"{name}_x" if f"{name}_x" in golden.inputs else "x"].clone().requires_grad_()
        out = layer(x)
        yield golden.compare(name, out, atol=ATOL)
        if f"grad/in/{name}.x" in golden.outputs:
            yield golden.compare(
                f"grad/in/{name}.x", torch.autograd.grad(out.sum(), x, retain_graph=True)[0], atol=ATOL
            )
        if f"{name}_l_aux" in golden.outputs:
            yield golden.compare(f"{name}_l_aux", layer.last_routing.balance_loss.view(1), atol=ATOL)
