"""PPMA: both forms of the attention with their masks and gradients, and the network."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    if "logits" in golden.outputs:
        model = regard.from_official("ppma", golden.state(), **golden.kwargs).eval()
        yield golden.compare("logits", model(golden.inputs["x"]), 1e-4)
        return
    for form in ("whole", "chunk"):
        layer = regard.from_official(
            "ppma", golden.state(f"{form}."), variant="attention", form=form, **golden.kwargs
        ).eval()
        x = golden.inputs["x"].clone().requires_grad_()
        y = layer(x)
        yield golden.compare(f"{form}.y", y, ATOL)
        yield golden.compare(f"grad/in/{form}.x", torch.autograd.grad(y.sum(), x)[0], ATOL)
        if form == "whole":
            yield golden.compare("whole.log_mask", layer.path_embed.dense(x), ATOL)
        else:
            rows, columns = layer.path_embed(x)
            yield golden.compare("chunk.log_mask_w", rows, ATOL)
            yield golden.compare("chunk.log_mask_h", columns, ATOL)
