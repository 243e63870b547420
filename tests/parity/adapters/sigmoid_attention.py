"""Sigmoid attention: the attention simulator's layers, their weights, and the block."""

from collections.abc import Iterable

import torch

import regard
from regard.mechanisms.heads.sigmoid import SigmoidBlock
from tests.parity.harness import Comparison, Golden, indicators

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs = {name: golden.kwargs[name] for name in ("dim", "num_heads")}
    x = golden.inputs["x"].clone().requires_grad_()
    for variant in ("alibi_causal", "rope_bias", "seqlen_norm", "sqrt_seqlen_norm", "cross"):
        layer = regard.from_official("sigmoid-attention", golden.state(f"{variant}."), variant=variant, **kwargs)
        source = golden.inputs["kv"] if variant == "cross" else x
        out = layer(x, source if variant == "cross" else None)
        yield golden.compare(variant, out, atol=ATOL)
        if variant == "alibi_causal":  # the file's only gradient is this one's
            yield golden.compare("grad/in/x", torch.autograd.grad(out.sum(), x)[0], atol=ATOL)
        q, k, _ = layer.qkv(x, source)
        each = indicators(k)
        yield golden.compare(f"{variant}.attn", layer.mix(q, k, each), atol=ATOL)

    block = SigmoidBlock.from_official(golden.state("block."), **kwargs)
    yield golden.compare("block", block(x), atol=ATOL)
