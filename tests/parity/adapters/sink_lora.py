"""SinkLoRA: the released S²-Attn forward of a Llama layer in training."""

from collections.abc import Iterable

import torch

import regard
from regard.mechanisms.sparse.sink_lora import into_groups
from tests.parity.harness import Comparison, Golden, indicators


def check(golden: Golden) -> Iterable[Comparison]:
    layer = regard.from_official("sink-lora", golden.state(), **golden.kwargs)
    hidden = golden.inputs["hidden_states"].clone().requires_grad_()
    out = layer(hidden)
    yield golden.compare("s2_attn", out, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    yield golden.compare("grad/in/hidden_states", gradient, atol=1e-5)

    group = layer.groups_of(hidden.shape[1])
    q, k, _ = layer.qkv(hidden)
    k = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)
    q, k = (into_groups(t, group, layer.shifted_heads) for t in (q, k))
    each = indicators(k)
    weights = regard.attention(q, k, each, mask=regard.masks.causal(), backend="reference")
    yield golden.compare("s2_weights", weights, atol=1e-5)
