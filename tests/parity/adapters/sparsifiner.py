"""Sparsifiner: the classifier, and what the predictor of each block chose."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    model = regard.from_official("sparsifiner", golden.state(), variant="model", **golden.kwargs).eval()
    out = model.forward_details(golden.inputs["x"])
    yield golden.compare("logits", out.logits, ATOL)
    yield golden.compare("features", out.features, ATOL)
    sparsity = torch.stack([layer.connectivity.sparsity() for layer in out.layers]).mean(0)
    for i, layer in enumerate(out.layers):
        found = {
            "approx_attn": lambda layer: layer.connectivity.approx,
            "basis_coef": lambda layer: layer.connectivity.coef,
            "attn_mask": lambda layer: layer.connectivity.mask,
            "masked_attn": lambda layer: layer.weights(),
            "unmasked_attn": lambda layer: layer.dense_weights(),
            "token_mask": lambda layer: layer.tokens,
        }
        for name, value in found.items():
            if f"block{i}/{name}" in golden.outputs:
                yield golden.compare(f"block{i}/{name}", value(layer), ATOL)
    if "sparsity" in golden.outputs:
        yield golden.compare("sparsity", sparsity, ATOL)
