"""CAS-ViT: the token mixer with its gradient, and the backbone."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    x = golden.inputs["x"]
    if "dim" in golden.kwargs:
        layer = regard.from_official("cas-vit", golden.state(), variant="attention", **golden.kwargs).eval()
        x = x.requires_grad_()
        y = layer(x.movedim(1, -1)).movedim(-1, 1)
        yield golden.compare("y", y, 1e-5)
        yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], 1e-5)
    else:
        model = regard.from_official("cas-vit", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(x), 1e-4)
