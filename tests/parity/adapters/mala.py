"""MALA: the linear layer and its gradient, the softmax layer, and the backbone."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs = golden.kwargs["attn"]
    layer = regard.from_official("mala", golden.state("attn."), variant="grid", **kwargs)
    x = golden.inputs["attn_x"].requires_grad_()
    y = layer(x.movedim(1, -1)).movedim(-1, 1)
    yield golden.compare("attn", y, ATOL)
    yield golden.compare("grad/in/attn_x", torch.autograd.grad(y.sum(), x)[0], ATOL)
    layer = regard.from_official("mala", golden.state("vanilla."), variant="grid", linear=False, **kwargs)
    yield golden.compare("vanilla", layer(x.movedim(1, -1)).movedim(-1, 1), ATOL)
    model = regard.from_official("mala", golden.state("model."), variant="model", **golden.kwargs["model"]).eval()
    yield golden.compare("logits", model(golden.inputs["image"]), 1e-4)
