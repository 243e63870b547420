"""Deconstructed attention: the Taylor form in parallel, by chunks and token by token, with its gradients."""

from collections.abc import Iterable

import torch

from regard.mechanisms.linear.deconstructed import taylor_attention
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    q, k, v = (golden.inputs[name].requires_grad_() for name in "qkv")
    for form in ("parallel", "chunked", "recurrent"):
        out, _ = taylor_attention(q, k, v, form=form)
        yield golden.compare("approximate", out, ATOL)
        for name, gradient in zip("qkv", torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            yield golden.compare(f"grad/in/approximate.{name}", gradient, ATOL)
