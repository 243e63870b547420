"""In-context regression: the answer, the circuits of the single layer, and gradients of the summed answer."""

from collections.abc import Iterable

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-6


def check(golden: Golden) -> Iterable[Comparison]:
    model = regard.from_official("icl-linear-attention", golden.state(), **golden.kwargs)
    inputs = {name: golden.inputs[name].clone().requires_grad_() for name in ("z_q", "z")}
    y_q = model(**inputs)
    yield golden.compare("y_q", y_q, ATOL)
    for i, layer in enumerate(model.layers):
        for name, value in layer.circuits()._asdict().items():
            key = name if name in golden.outputs else f"{name}.{i}"
            if key in golden.outputs:
                yield golden.compare(key, value, ATOL)
    y_q.sum().backward()
    for name, value in inputs.items():
        if f"grad/in/{name}" in golden.outputs:
            assert value.grad is not None
            yield golden.compare(f"grad/in/{name}", value.grad, ATOL)
