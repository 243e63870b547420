"""ResNet: published sizes, and torchvision's weights against the network written with plain convolutions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, Unsupported
from regard.models.vision.resnet import RESNETS, ResNet
from tests.models.vision.counts import gigamacs, millions


@pytest.mark.parametrize(  # as torchvision gives them
    ("name", "parameters", "macs"),
    [("resnet18", 11.689512, 1.814), ("resnet34", 21.797672, 3.664), ("resnet50", 25.557032, 4.089)],
)
def test_published_sizes(name: str, parameters: float, macs: float) -> None:
    config = RESNETS[name]
    assert millions("duoformer/resnet", **config) == pytest.approx(parameters, rel=1e-7)
    assert gigamacs("duoformer/resnet", **config) == pytest.approx(macs, abs=5e-4)


def weights(layers: tuple[int, ...], expansion: int, classes: int) -> dict[str, Tensor]:
    """A state dict with torchvision's names, drawn at random."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, norm: str, dim_in: int, dim: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(dim, dim_in, size, size) * (2 / dim_in / size**2) ** 0.5
        for part in ("weight", "running_var"):
            state[f"{norm}.{part}"] = torch.rand(dim) + 0.5
        for part in ("bias", "running_mean"):
            state[f"{norm}.{part}"] = torch.randn(dim) * 0.1
        state[f"{norm}.num_batches_tracked"] = torch.tensor(3)

    conv("conv1", "bn1", 3, 64, 7)
    before = 64
    for i, depth in enumerate(layers):
        inner, dim = 64 * 2**i, 64 * 2**i * expansion
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            if before != dim or (i and not j):
                conv(f"{block}.downsample.0", f"{block}.downsample.1", before, dim, 1)
            shapes = [(before, inner, 1), (inner, inner, 3), (inner, dim, 1)]
            if expansion == 1:
                shapes = [(before, dim, 3), (dim, dim, 3)]
            for n, (a, b, size) in enumerate(shapes, 1):
                conv(f"{block}.conv{n}", f"{block}.bn{n}", a, b, size)
            before = dim
    return state | {"fc.weight": torch.randn(classes, before) * 0.1, "fc.bias": torch.randn(classes)}


def naive(state: dict[str, Tensor], layers: tuple[int, ...], expansion: int, x: Tensor) -> Tensor:
    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        s = [state[f"{norm}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")]
        return (x - s[0]) / (s[1] + 1e-5).sqrt() * s[2] + s[3]

    x = F.max_pool2d(conv(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for i, depth in enumerate(layers):
        for j in range(depth):
            block, stride = f"layer{i + 1}.{j}", 2 if i and not j else 1
            shortcut = x
            if f"{block}.downsample.0.weight" in state:
                shortcut = conv(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            strides = [1, stride, 1] if expansion == 4 else [stride, 1]
            for n, step in enumerate(strides, 1):
                x = conv(x, f"{block}.conv{n}", f"{block}.bn{n}", step)
                x = x.relu() if n < len(strides) else (x + shortcut).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(("block", "expansion", "layers"), [("BasicBlock", 1, (2, 1)), ("Bottleneck", 4, (1, 2, 1))])
def test_torchvisions_weights(block: str, expansion: int, layers: tuple[int, ...]) -> None:
    state = weights(layers, expansion, 5)
    model = regard.from_official("duoformer", state, variant="resnet", layers=layers, block=block, num_classes=5).eval()
    images = torch.randn(2, 3, 35, 50)
    torch.testing.assert_close(model(images), naive(state, layers, expansion, images), atol=1e-4, rtol=1e-4)


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="block"):
        ResNet.from_official({}, layers=(1, 1), block="Other")
    with pytest.raises(ArgumentError, match="depths"):
        ResNet(depths=(1, 1))
    with pytest.raises(ArgumentError, match="dims"):
        ResNet(dims=(6, 8), depths=(1, 1))
