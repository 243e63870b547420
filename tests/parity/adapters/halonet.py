"""HaloNet: the attention layer with its gradient (`halonet-attention`), and the network in timm's form (`halonet`)."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("halonet", golden.state(), **golden.kwargs).eval()
        features = model.proj(model.forward_features(golden.inputs["x"])[-1])
        yield golden.compare("features", features.movedim(-1, 1), 1e-4)
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    layer = regard.from_official("halonet", golden.state(), variant="attention", **golden.kwargs)
    x = golden.inputs["x"].requires_grad_()
    y = layer(x.movedim(1, -1)).movedim(-1, 1)
    yield golden.compare("y", y, 1e-5)
    yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], 1e-5)
