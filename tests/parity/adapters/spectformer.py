"""SpectFormer: spectral gating with its gradient, and both backbones."""

from collections.abc import Iterable
from math import isqrt

import torch

import regard
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs = golden.kwargs
    if "h" in kwargs:
        x = golden.inputs["x"].requires_grad_()
        side = isqrt(x.shape[1])
        grid = golden.inputs["spatial_size"].tolist() if "spatial_size" in golden.inputs else [side, side]
        layer = regard.from_official("spectformer", golden.state(), variant="gating", grid_size=grid, **kwargs)
        y = layer(x.unflatten(1, grid)).flatten(1, 2)
        yield golden.compare("y", y, 1e-5)
        yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], 1e-5)
    elif "embed_dims" in kwargs or "stem_hidden_dim" in kwargs:
        model = regard.from_official("spectformer", golden.state(), variant="h", **kwargs).eval()
        image = golden.inputs["x"] if "x" in golden.inputs else golden.inputs["x_small"]
        times = [own // given for own, given in zip(model.img_size, image.shape[2:], strict=True)]
        image = image.repeat_interleave(times[0], 2).repeat_interleave(times[1], 3)
        yield golden.compare("logits", model(image), 1e-4)
    else:
        model = regard.from_official("spectformer", golden.state(), **kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
