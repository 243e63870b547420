"""Neighborhood attention in 1 to 3 dimensions: fused outputs, the weights, and all gradients."""

from collections.abc import Iterable

import torch

from regard.mechanisms.grid.neighborhood import neighborhood_attention, neighborhood_qk
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    for case, kwargs in golden.kwargs.items():
        given = {name.split(".")[1]: t for name, t in golden.inputs.items() if name.startswith(f"{case}.")}
        grad_out = given.pop("grad_out").movedim(1, -2)
        given = {name: t.requires_grad_() for name, t in given.items()}
        # published heads-first; a bias has its heads in front here too
        ours = {name: t if name == "rpb" else t.movedim(1, -2) for name, t in given.items()}
        window = (kwargs["kernel_size"], kwargs["dilation"], 1, kwargs["is_causal"])
        y = neighborhood_attention(ours["query"], ours["key"], ours["value"], *window, **_rest(ours))
        yield golden.compare(f"{case}.y", y.movedim(-2, 1), ATOL)
        rest = {name: t for name, t in _rest(ours).items() if name != "additional_values"}
        scores = neighborhood_qk(ours["query"], ours["key"], *window, **rest)
        yield golden.compare(f"{case}.attn", scores.softmax(-1).movedim(-2, 1), ATOL)
        wanted = [name for name in given if f"grad/in/{case}.{name}" in golden.outputs]
        grads = torch.autograd.grad(y, [given[name] for name in wanted], grad_out)
        for name, grad in zip(wanted, grads, strict=True):
            yield golden.compare(f"grad/in/{case}.{name}", grad, ATOL)


def _rest(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in given.items() if name not in ("query", "key", "value")}
