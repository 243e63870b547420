"""Lightning attention: the operation, two published layers, and the language model."""

from collections.abc import Iterable

import torch

import regard
from regard.linear import linear_attention
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    inputs, kwargs = golden.inputs, golden.kwargs
    q, k, v = (inputs[name].clone().requires_grad_() for name in "qkv")
    out = linear_attention(q, k, v, decay=-inputs["slopes"].flatten(), chunk_size=4).out
    yield golden.compare("lightning", out, atol=ATOL)
    for name, gradient in zip("qkv", torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        yield golden.compare(f"grad/in/{name}", gradient, atol=ATOL)
    yield golden.compare("lightning_no_decay", linear_attention(q, k, v, chunk_size=4).out, atol=ATOL)

    layer = regard.from_official("lightning-attention", golden.state("tnl."), variant="tnl", **kwargs["tnl"])
    yield golden.compare("tnl", layer(inputs["x"]), atol=ATOL)
    yield golden.compare("tnl_slopes", layer.slopes.view(-1, 1, 1), atol=ATOL)

    layer = regard.from_official(
        "lightning-attention", golden.state("minimax."), variant="minimax", **kwargs["minimax"]
    )
    y, state = layer.stream(inputs["x"])
    yield golden.compare("minimax", y, atol=ATOL)
    yield golden.compare("minimax_state", state.sums, atol=ATOL)
    padded = layer(inputs["x"], valid=inputs["padding_mask"].bool())
    yield golden.compare("minimax_padded", padded, atol=ATOL)

    model = regard.from_official(
        "lightning-attention", golden.state("transnormer."), variant="model", **kwargs["transnormer"]
    )
    yield golden.compare("transnormer_logits", model(inputs["input_ids"]), atol=ATOL)
