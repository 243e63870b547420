"""Key-driven GQA: the four published modules, their allocations and buffers."""

from collections.abc import Iterable

import torch

import regard
from regard.mechanisms.heads.key_driven import SCHEMES, key_magnitudes
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    for scheme in SCHEMES:
        if not golden.state(f"{scheme}."):
            continue
        layer = regard.from_official("key-driven-gqa", golden.state(f"{scheme}."), variant=scheme, **golden.kwargs)
        layer.eval()
        x = golden.inputs["x"].clone().requires_grad_()
        noise = [golden.inputs[name] for name in sorted(golden.inputs, key=_number) if name.startswith("pgqa_noise")]
        out = layer(x, noise=noise if scheme == "pgqa" else None)
        yield golden.compare(scheme, out, atol=ATOL)
        if f"grad/in/{scheme}.x" in golden.outputs:
            yield golden.compare(f"grad/in/{scheme}.x", torch.autograd.grad(out.sum(), x)[0], atol=ATOL)
        if f"{scheme}_allocation" in golden.outputs:
            yield golden.compare(f"{scheme}_allocation", layer.last_allocation, atol=0)
        if f"{scheme}_key_norms" in golden.outputs:
            keys = layer.k_proj(x).unflatten(-1, (layer.num_kv_heads, -1)).transpose(1, 2)
            yield golden.compare(f"{scheme}_key_norms", key_magnitudes(keys), atol=ATOL)
        if f"{scheme}_cache_after" in golden.outputs:
            yield golden.compare(f"{scheme}_cache_after", layer.magnitudes, atol=ATOL)


def _number(name: str) -> int:
    tail = name.rpartition(".")[2]
    return int(tail) if tail.isdigit() else -1
