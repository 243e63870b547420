"""DuoFormer: the head with one of its blocks and its gradient; the tables of the tokens of each patch."""

import math
from collections.abc import Iterable

import torch

import regard
from regard.mechanisms.grid.multi_scale import DuoFormerHead, multi_scale_tokens, patch_tokens
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    if golden.name == "duoformer-tokens" or "tokens" in golden.outputs:
        yield from tables(golden)
        return
    head = regard.from_official("duoformer", golden.state(), **golden.kwargs).eval()
    assert isinstance(head, DuoFormerHead)
    tokens = golden.inputs["tokens"].requires_grad_()
    logits = head(tokens)
    yield golden.compare("logits", logits, ATOL)
    for i, block in enumerate(head.scale_blocks):
        if f"scale_block{i}" in golden.outputs:
            yield golden.compare(f"scale_block{i}", block(tokens.flatten(0, 1)).view(tokens.shape), ATOL)
    if "grad/in/tokens" in golden.outputs:
        yield golden.compare("grad/in/tokens", torch.autograd.grad(logits.sum(), tokens)[0], ATOL)


def tables(golden: Golden) -> Iterable[Comparison]:
    names = [name for name in golden.outputs if name.startswith("index")]
    side = math.isqrt(golden.outputs[names[0]].shape[0])
    for name in names:
        pixels = side * math.isqrt(golden.outputs[name].shape[1])
        numbers = torch.arange(pixels**2).view(1, pixels, pixels, 1)
        yield golden.compare(name, patch_tokens(numbers, (side, side))[0, ..., 0], 0)
    features = [golden.inputs[name].movedim(1, -1) for name in sorted(golden.inputs) if name.startswith("feat")]
    yield golden.compare("tokens", multi_scale_tokens(features, (side, side)), ATOL)
