"""lucidrains' port of Titans: memories of several configurations, and the language model around them."""

from collections.abc import Iterable

import torch
from torch import Tensor

import regard
from regard.mechanisms.memory.titans import MemoryState
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    x = golden.inputs["seq"]
    for name, kwargs in golden.kwargs.items():
        if name == "mac":
            model = regard.from_official("titans", golden.state("mac."), variant="model", **kwargs).eval()
            yield golden.compare("mac_logits", model(golden.inputs["input_ids"]), ATOL)
            continue
        memory = regard.from_official("titans", golden.state(f"{name}."), **kwargs)
        y, state = memory.stream(x)
        yield golden.compare(name, y, ATOL)
        for key, got in published(state).items():
            if f"{name}.{key}" in golden.outputs:
                yield golden.compare(f"{name}.{key}", got, ATOL)
        if name == "linear":
            yield from linear(golden, memory)


def linear(golden: Golden, memory: torch.nn.Module) -> Iterable[Comparison]:
    x = golden.inputs["seq"].requires_grad_()
    yield golden.compare("grad/in/seq", torch.autograd.grad(memory(x).sum(), x)[0], ATOL)
    tokens = golden.inputs["stream_seq"]
    yield golden.compare("linear_full", memory(tokens), ATOL)
    state, pieces = None, []
    for token in tokens.split(1, 1):
        y, state = memory.stream(token, state)
        pieces.append(y)
    yield golden.compare("linear_stream", torch.cat(pieces, 1), ATOL)


def published(state: MemoryState) -> dict[str, Tensor]:
    """Weights (B·H, …) and momentum (1, B·H, …) under the port's names."""
    prefix = "model." if "norm" in state.weights else ""
    names = {own: "norm.gamma" if own == "norm" else f"{prefix}weights.{own[1:]}" for own in state.weights}
    found = {f"last_weights.{names[own]}": w.flatten(0, 1) for own, w in state.weights.items()}
    return found | {f"last_momentum.{names[own]}": s.flatten(0, 1)[None] for own, s in state.momentum.items()}
