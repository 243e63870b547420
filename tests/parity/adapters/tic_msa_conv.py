"""MSA-Conv: the weights, what is attended, the layer and its gradient."""

from collections.abc import Iterable

import torch

import regard
from regard.mechanisms.grid.msa_conv import MSAConv2d
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    layer = regard.from_official("tic-msa-conv", golden.state(), **golden.kwargs).eval()
    assert isinstance(layer, MSAConv2d)
    x = golden.inputs["x"].requires_grad_()
    ours = x.movedim(1, -1)
    yield golden.compare("attn", layer.weights(ours).squeeze(-2).movedim(-1, 1), ATOL)
    yield golden.compare("attended", layer.attend(ours).movedim(-1, 1), ATOL)
    y = layer(ours).movedim(-1, 1)
    yield golden.compare("y", y, ATOL)
    yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0], ATOL)
