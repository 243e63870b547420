"""Layer-wise relevance propagation of the salient relevance map: a small network, at three depths."""

from collections.abc import Iterable

import torch
from torch import nn

from regard.layers import load_strictly
from regard.probes import lrp
from tests.parity.harness import Comparison, Golden

RTOL, ATOL = 1e-4, 1e-5


def network(golden: Golden) -> nn.Sequential:
    """The network that the files describe in words; strides are what the shapes say."""
    w = {name: golden.weights[f"state/{name}.weight"].shape for name in ("0", "3", "7")}
    size = golden.inputs["x"].shape[-1]
    middle = golden.outputs["relevance_after_conv2"].shape[-1]
    last = round((w["7"][1] / w["3"][0]) ** 0.5)

    def conv(at: str, before: int, after: int) -> nn.Conv2d:
        k = w[at][-1]
        stride = next(s for s in range(1, before) if ((before + 2 * (k // 2) - k) // s + 1) // 2 == after)
        return nn.Conv2d(w[at][1], w[at][0], k, stride, k // 2)

    return nn.Sequential(
        conv("0", size, middle),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv("3", middle, last),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(*reversed(w["7"])),
    )


def check(golden: Golden) -> Iterable[Comparison]:
    model = network(golden)
    load_strictly(model, golden.state())
    x = golden.inputs["x"]
    logits = model(x)
    yield golden.compare("logits", logits, ATOL)
    for name, layer in {"relevance_fc": 7, "relevance_after_conv2": 3, "relevance_input": 0}.items():
        with torch.no_grad():
            found = lrp(model[layer:], model[:layer](x), logits.argmax(1))
        yield golden.compare(name, found, ATOL + RTOL * float(golden.outputs[name].abs().max()))
