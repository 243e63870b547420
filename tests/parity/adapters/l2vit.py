"""L2ViT: the linear attention and its gradient, and the backbone."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    layer = regard.from_official("l2vit", golden.state(group="state_attn"), **golden.kwargs["attn"])
    x = golden.inputs["attn_x"].requires_grad_()
    y = layer(x)
    yield golden.compare("attn", y, ATOL)
    yield golden.compare("grad/in/attn_x", torch.autograd.grad(y.sum(), x)[0], ATOL)
    model = regard.from_official("l2vit", golden.state(), variant="model", **golden.kwargs["model"]).eval()
    yield golden.compare("logits", model(golden.inputs["image"]), 1e-4)
