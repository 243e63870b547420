"""ComplexFormer: causal, unmasked, and one token after the cache."""

from collections.abc import Iterable

import torch
from torch import Tensor

import regard
from tests.parity.harness import Comparison, Golden, indicators

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    layer = regard.from_official("complexformer", golden.state(), **golden.kwargs)
    hidden = golden.inputs["hidden_states"].clone().requires_grad_()
    out = layer(hidden)
    yield golden.compare("output", out, atol=ATOL)
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    yield golden.compare("grad/in/hidden_states", gradient, atol=ATOL)
    q, k, _ = layer.prepare(hidden)
    yield golden.compare("attn", weights(q, k, layer.scale), atol=ATOL)

    _, state = layer.stream(hidden)
    out, state = layer.stream(golden.inputs["next_token"], state)
    yield golden.compare("next_output", out, atol=ATOL)
    q, _, _ = layer.prepare(golden.inputs["next_token"], past=hidden.shape[1])
    yield golden.compare("next_attn", weights(q, state.key, layer.scale), atol=ATOL)

    layer.causal = False
    yield golden.compare("output_nomask", layer(hidden), atol=ATOL)


def weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention to indicators of the keys is the weights."""
    each = indicators(k)
    mask = regard.masks.causal().shift(k.shape[2] - q.shape[2])
    return regard.attention(q, k, each, mask=mask, scale=scale)
