"""Dynamic mask attention: the first layer of a Doge model, its weights and gradient, and the model.

Repeated tokens have equal keys to choose from, so the published choice among equals is needed.
"""

from collections.abc import Iterable

import torch

import regard
from regard.mechanisms.sparse.dynamic_mask import published_mask
from tests.parity.harness import Comparison, Golden, indicators

ATOL = 1e-5
SLUG = "dynamic-mask-attention"


def check(golden: Golden) -> Iterable[Comparison]:
    layer = regard.from_official(SLUG, golden.state("model.layers.0.self_attn."), ties="topk", **golden.kwargs)
    x = golden.inputs["hidden_states"].clone().requires_grad_()
    y = layer(x)
    yield golden.compare("attn", y, ATOL)
    yield golden.compare("grad/in/hidden_states", torch.autograd.grad(y.sum(), x)[0], ATOL)
    q, k, v = layer.qkv(x, x)
    groups = layer.num_heads // layer.num_kv_heads
    worth = layer.worth(v)
    seen, bias = (t.repeat_interleave(groups, 1) for t in (published_mask(worth, layer.window_size), worth[:, :, None]))
    each = indicators(k)
    yield golden.compare("attn_weights", regard.attention(q, k, each, mask=seen, bias=bias), ATOL)
    model = regard.from_official(SLUG, golden.state(), variant="model", ties="topk", **golden.kwargs).eval()
    yield golden.compare("logits", model(golden.inputs["input_ids"]), ATOL)
