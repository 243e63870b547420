"""Compressed convolutional attention: transformers' ZayaAttention with all its intermediate results."""

from collections.abc import Iterable

import torch

import regard
from regard.positions import rotate
from tests.parity.harness import Comparison, Golden, indicators

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    layer = regard.from_official("compressed-convolutional-attention", golden.state(), **golden.kwargs)
    hidden = golden.inputs["hidden_states"].clone().requires_grad_()
    angles = golden.inputs["cos"], golden.inputs["sin"]
    out = layer(hidden, angles=angles)
    yield golden.compare("attn_output", out, atol=ATOL)
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    yield golden.compare("grad/in/hidden_states", gradient, atol=ATOL)

    q, k, v, _, _ = layer.compress(hidden)
    for name, part in (("cca_q", q), ("cca_k", k), ("cca_v", v)):
        yield golden.compare(name, part.transpose(1, 2), atol=ATOL)
    q, k = layer.normalize(q, k)
    for name, part in (("normed_q", q), ("normed_k", k)):
        yield golden.compare(name, part.transpose(1, 2), atol=ATOL)
    each = indicators(k)
    weights = regard.attention(rotate(q, *angles), rotate(k, *angles), each, mask=regard.masks.causal())
    yield golden.compare("attn_weights", weights, atol=ATOL)
