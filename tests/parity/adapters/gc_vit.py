"""GC ViT: local and global window attention with gradients, the query generator, and the network."""

from collections.abc import Iterable

import torch
from torch import Tensor

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("gc-vit", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    kwargs = golden.kwargs["attention"]
    q_global = golden.inputs["q_global"].requires_grad_()

    def image(windows: Tensor) -> Tensor:
        """Windows (B · n, w², C) as images of n windows on top of each other."""
        side = kwargs["window_size"]
        return windows.reshape(len(q_global), -1, side, windows.shape[-1])

    for kind in ("global", "local"):
        layer = regard.from_official("gc-vit", golden.state(f"{kind}."), variant=kind, **kwargs)
        x = golden.inputs["x"].clone().requires_grad_()
        given = (image(x), q_global.squeeze(1)) if kind == "global" else (image(x),)
        y = layer(*given).reshape(x.shape)
        yield golden.compare(f"{kind}.y", y, ATOL)
        inputs = (x, q_global) if kind == "global" else (x,)
        for name, gradient in zip(("x", "q_global"), torch.autograd.grad(y.sum(), inputs), strict=False):
            yield golden.compare(f"grad/in/{kind}.{name}", gradient, ATOL)
    kwargs_queries = golden.kwargs["query_gen"]
    generator = regard.from_official("gc-vit", golden.state("query_gen."), variant="queries", **kwargs_queries)
    got = generator(golden.inputs["query_gen.x"].movedim(1, -1)).unsqueeze(1)
    yield golden.compare("query_gen.q_global", got, ATOL)
