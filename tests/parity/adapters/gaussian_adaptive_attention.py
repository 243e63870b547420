"""Gaussian adaptive attention: the block, its first layer alone, every layer's weights, and the input's gradient."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-6


def check(golden: Golden) -> Iterable[Comparison]:
    block = regard.from_official("gaussian-adaptive-attention", golden.state(), **golden.kwargs)
    x = golden.inputs["x"].requires_grad_()
    y, weights = block(x, return_weights=True)
    yield golden.compare("y", y, ATOL)
    for i, weight in enumerate(weights):
        yield golden.compare(f"weights.layer_{i}", weight, ATOL)
    kwargs = {name: value[0] for name, value in golden.kwargs.items() if isinstance(value, list)}
    layer = regard.from_official(
        "gaussian-adaptive-attention",
        golden.state("layers.0."),
        variant="MultiHeadGaussianAdaptiveAttention",
        norm_axis=kwargs["norm_axes"],
        num_heads=kwargs["num_heads"],
        num_gaussians=kwargs["num_gaussians"],
        padding_value=golden.kwargs["padding_value"],
    )
    yield golden.compare("layer0_only", layer(x), ATOL)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    yield golden.compare("grad/in/x", gradient, ATOL)
