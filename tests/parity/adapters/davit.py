"""DaViT: spatial and channel block, their attention alone, gradients, and the network."""

from collections.abc import Iterable
from math import isqrt

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("davit", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    kwargs = {**golden.kwargs}
    if (windows := golden.outputs.get("spatial.attn")) is not None:
        kwargs.setdefault("window_size", isqrt(windows.shape[1]))
    height, width = golden.inputs["size"].tolist()
    for kind in ("channel", "spatial"):
        block = regard.from_official("davit", golden.state(f"{kind}."), variant="block", kind=kind, **kwargs)
        x = golden.inputs["x"].clone().requires_grad_()
        y = block(x.unflatten(1, (height, width))).flatten(1, 2)
        yield golden.compare(f"{kind}.y", y, ATOL)
        yield golden.compare(f"grad/in/{kind}.x", torch.autograd.grad(y.sum(), x)[0], ATOL)
        if f"{kind}.attn" not in golden.outputs:
            continue
        if kind == "channel":
            got = block.attn(x)
        else:
            side = kwargs["window_size"]
            got = block.attn(x.reshape(-1, side, side, x.shape[-1])).flatten(1, 2)
        yield golden.compare(f"{kind}.attn", got, ATOL)
