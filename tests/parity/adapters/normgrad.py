"""NormGrad: every map of a small network, named in the file as layer.extract.aggregate."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from regard.layers import load_strictly
from regard.probes import backprop_saliency
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


class Network(nn.Sequential):
    """The network that the files describe in words."""

    def __init__(self, c1: int, c2: int, k: int, **_: Any) -> None:
        super().__init__()
        layers = {
            "conv1": nn.Conv2d(3, c1, 3, padding=1),
            "relu1": nn.ReLU(inplace=True),
            "conv2": nn.Conv2d(c1, c1, 3, padding=1),
            "relu2": nn.ReLU(inplace=True),
            "pool": nn.MaxPool2d(2),
            "conv3": nn.Conv2d(c1, c2, 3, padding=1),
            "relu3": nn.ReLU(inplace=True),
            "mean": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "fc": nn.Linear(c2, k),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs = golden.kwargs
    model = Network(**kwargs)
    load_strictly(model, golden.state())
    size = (kwargs["out_size"],) * 2
    for name in golden.outputs:
        layer, extract, aggregate = name.split(".")
        layers = kwargs["layers"] if layer == "combined" else [layer]
        found = backprop_saliency(
            model, golden.inputs["x"], kwargs["target_index"], layers, extract, aggregate, size=size
        )
        yield golden.compare(name, found[0], ATOL)
