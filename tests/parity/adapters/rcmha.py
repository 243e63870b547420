"""RCMHA: the published attention, with and without memory; sequence first there."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    query = golden.inputs["query"].clone().requires_grad_()
    n, keys = len(query), len(golden.inputs["key_value"])
    # the keys are [memory, query]; gradients reach the query through them too, unless they were an input of their own
    separate = "grad/in/key_value" in golden.outputs
    key_value = golden.inputs["key_value"].clone().requires_grad_()
    if not separate:
        key_value = torch.cat([golden.inputs["key_value"][: keys - n], query])
        assert torch.equal(key_value, golden.inputs["key_value"])
    layer = regard.from_official("rcmha", golden.state(), past=keys, **golden.kwargs).eval()
    mask = golden.inputs["mask"].bool()  # (N, K) or (N, K, B or 1), True is visible
    mask = mask if mask.dim() == 2 else mask.permute(2, 0, 1).unsqueeze(1)
    x, source = query.transpose(0, 1), key_value.transpose(0, 1)
    out = layer.attend(x, source, mask).transpose(0, 1)
    yield golden.compare("output", out, atol=ATOL)
    inputs = {"query": query, "key_value": key_value} if separate else {"query": query}
    for name, gradient in zip(inputs, torch.autograd.grad(out.sum(), list(inputs.values())), strict=True):
        yield golden.compare(f"grad/in/{name}", gradient, atol=ATOL)

    q, k, _ = layer.project(x, source)
    scores = (q + layer.query_bias[:, None]) @ k.mT + layer.position_scores(q, keys)
    yield golden.compare("scores_unscaled", scores.permute(2, 3, 0, 1), atol=ATOL)
    weights = (scores * layer.head_dim**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    yield golden.compare("attn", weights.permute(2, 3, 0, 1), atol=ATOL)
