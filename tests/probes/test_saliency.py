"""Backpropagation saliency against loops over places, its identities, its cost, and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.probes import (
    backprop_saliency,
    class_sensitivity,
    gradcam,
    gradient,
    linear_approx,
    meta_saliency,
    normgrad,
)
from regard.probes.saliency import contribution

EXTRACT = ("bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise")
AGGREGATE = ("sum", "max", "abs_max", "norm", "filter_norm")


def network(width: int = 6, classes: int = 4, channels: int = 3, inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(inplace),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def places(a: torch.Tensor, b: torch.Tensor, extract: str) -> torch.Tensor:
    """(B, H, W, numbers) what each place would give to the gradient of the inserted layer, one by one."""
    batch, channels, height, width = a.shape
    rows = []
    for n in range(batch):
        for i in range(height):
            for j in range(width):
                near = torch.zeros(channels, 3, 3, dtype=a.dtype)
                for r in range(-1, 2):
                    for s in range(-1, 2):
                        if 0 <= i + r < height and 0 <= j + s < width:
                            near[:, r + 1, s + 1] = a[n, :, i + r, j + s]
                x, g = a[n, :, i, j], b[n, :, i, j]
                rows.append(
                    {
                        "bias": g,
                        "scaling": x * g,
                        "conv1x1": torch.outer(x, g).flatten(),
                        "conv3x3": torch.outer(near.flatten(), g).flatten(),
                        "conv3x3_depthwise": (near * g[:, None, None]).flatten(),
                    }[extract]
                )
    return torch.stack(rows).unflatten(0, (batch, height, width))


def aggregated(found: torch.Tensor, aggregate: str) -> torch.Tensor:
    return {
        "sum": found.sum(-1),
        "max": found.amax(-1),
        "abs_max": found.abs().amax(-1),
        "norm": found.norm(dim=-1),
        "filter_norm": found.clamp(min=0).norm(dim=-1),
    }[aggregate]


def normalised(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    maps = torch.stack([F.interpolate(one[None, None], size, mode="bilinear")[0, 0] for one in maps])
    maps = torch.stack([one - one.min() for one in maps])
    return torch.stack([one / one.max() for one in maps])


def at(model: nn.Sequential, layer: int, x: torch.Tensor, classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a layer and minus its gradient, from the model in two halves."""
    middle = model[: layer + 1](x).detach().clone().requires_grad_()
    scores = model[layer + 1 :](middle.clone())
    (slope,) = torch.autograd.grad(sum(scores[i, c] for i, c in enumerate(classes)), middle)
    return middle.detach(), slope


@pytest.mark.parametrize("extract", EXTRACT)
def test_equals_the_definition_place_by_place(extract) -> None:
    model, x = network().double(), torch.randn(2, 3, 8, 6, dtype=torch.float64)
    for layer in (2, 4):
        found = places(*at(model, layer, x, [1, 3]), extract)
        for aggregate in AGGREGATE:
            want = normalised(aggregated(found, aggregate), (11, 9))
            got = backprop_saliency(model, x, torch.tensor([1, 3]), [str(layer)], extract, aggregate, size=(11, 9))
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_norms_factorise() -> None:
    a, b = torch.randn(2, 5, 4, 6, dtype=torch.float64), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    patches = F.unfold(a, 3, padding=1).unflatten(2, (4, 6))
    for k, inputs in ((1, a), (3, patches)):
        got = contribution(a, b, k, "norm", dense=True)
        torch.testing.assert_close(got, inputs.norm(dim=1) * b.norm(dim=1), atol=1e-6, rtol=0)
        positive = inputs.clamp(min=0).norm(dim=1) ** 2 * b.clamp(min=0).norm(dim=1) ** 2
        negative = inputs.clamp(max=0).norm(dim=1) ** 2 * b.clamp(max=0).norm(dim=1) ** 2
        got = contribution(a, b, k, "filter_norm", dense=True)
        torch.testing.assert_close(got, (positive + negative).sqrt(), atol=1e-6, rtol=0)
        got = contribution(a, b, k, "sum", dense=True)
        torch.testing.assert_close(got, inputs.sum(1) * b.sum(1), atol=1e-6, rtol=0)


def test_special_cases_are_the_methods_known_by_name() -> None:
    model, x = network().double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    a, b = at(model, 6, x, [2])
    cam = (a * b.mean((2, 3), keepdim=True)).sum(1).clamp(min=0)
    close = partial(torch.testing.assert_close, atol=1e-9, rtol=0)
    close(gradcam(model, x, 2, ["6"]), normalised(cam, (8, 8)))
    a, b = at(model, 3, x, [2])
    close(linear_approx(model, x, 2, ["3"]), normalised((a * b).sum(1), (8, 8)))
    close(normgrad(model, x, 2, ["3"]), normalised(a.norm(dim=1) * b.norm(dim=1), (8, 8)))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf)[0, 2], leaf)
    close(gradient(model, x, 2), normalised(slope.abs().amax(1), (8, 8)))


def test_layers_are_combined() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    one, other = normgrad(model, x, 0, ["3"]), normgrad(model, x, 0, ["4"])
    torch.testing.assert_close(normgrad(model, x, 0, ["3", "4"]), one * other)
    got = normgrad(model, x, 0, ["3", "4"], combine="geometric", weights=[3.0, 1.0])
    torch.testing.assert_close(got, one**0.75 * other**0.25)
    torch.testing.assert_close(
        normgrad(model, x, 0, ["3", "4"], combine="geometric"), (one * other).sqrt(), atol=1e-6, rtol=1e-5
    )


def test_a_constant_map_is_zero() -> None:
    """Below global pooling the gradient is the same everywhere."""
    model, x = network(), torch.randn(2, 3, 8, 8)
    for aggregate in AGGREGATE:
        assert not backprop_saliency(model, x, 1, ["6"], "bias", aggregate).any()


def test_the_model_is_left_as_it_was_and_pictures_are_alone() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(True), network(channels=5)).train()
    model[1].eval()
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 3, 9, 9)
    got = normgrad(model, x, None, ["1", "2", "3.0"])
    alone = torch.cat([normgrad(model, x[i : i + 1], None, ["1", "2", "3.0"]) for i in range(3)])
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert model.training
    assert not model[1].training
    assert not any(module._forward_hooks for module in model.modules())


def test_in_place_activations_make_no_difference() -> None:
    x, layers = torch.randn(1, 3, 8, 8), ["0", "1", "2", "5"]
    torch.testing.assert_close(
        backprop_saliency(network(inplace=True), x, 1, layers, "scaling", "max"),
        backprop_saliency(network(inplace=False), x, 1, layers, "scaling", "max"),
    )


class Tokens(nn.Module):
    """Patches of a picture as tokens after a class token, and the same as a grid with channels last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.grid, self.tokens, self.head = nn.Identity(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.grid(self.patches(x).permute(0, 2, 3, 1))
        tokens = F.pad(grid.flatten(1, 2), (0, 0, 1, 0))
        return self.head(self.tokens(tokens).tanh().square()[:, 1:].mean(1))


def test_tokens_and_channels_last() -> None:
    model, x = Tokens(), torch.randn(2, 3, 8, 12)
    for extract in EXTRACT:
        first = backprop_saliency(model, x, 1, ["patches"], extract)
        torch.testing.assert_close(first, backprop_saliency(model, x, 1, ["grid"], extract, channels_last=True))
    want = normgrad(model, x, 1, ["tokens"], grid=(4, 6))
    assert want.shape == (2, 8, 12)
    square = normgrad(model, x[..., :8], 1, ["tokens"])
    torch.testing.assert_close(square, normgrad(model, x[..., :8], 1, ["tokens"], grid=(4, 4)))
    with pytest.raises(ArgumentError, match="grid: needed"):
        normgrad(model, torch.randn(1, 3, 8, 6), 1, ["tokens"])
    with pytest.raises(ArgumentError, match="does not fit 25 tokens"):
        normgrad(model, x, 1, ["tokens"], grid=(6, 6))


class _Largest(TorchDispatchMode):
    """The largest tensor made, and how many convolutions ran forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.forward, self.backward = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("aggregate", AGGREGATE)
def test_one_forward_one_backward_and_no_product(aggregate) -> None:
    model, x = network(width=32), torch.randn(1, 3, 8, 8)
    for extract in EXTRACT:
        with _Largest() as seen:
            backprop_saliency(model, x, 1, ["1", "3"], extract, aggregate)
        assert (seen.forward, seen.backward) == (3, 2)  # none below the first of the layers
        assert seen.numel <= 32 * 32 * 9  # the weights; an outer product would have 32 · 32 · 64 and more


def test_class_sensitivity() -> None:
    model, x = network(), torch.randn(3, 3, 8, 8)
    blind = torch.rand(3, 5, 5)
    assert class_sensitivity(lambda *_: blind, model, x) == pytest.approx(1.0)
    assert class_sensitivity(lambda *_: torch.ones(3, 5, 5), model, x) == 1.0
    logits = model(x)
    calls = []

    def opposite(_: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        calls.append(classes)
        return blind if len(calls) == 1 else 1 - 2 * blind

    assert class_sensitivity(opposite, model, x) == pytest.approx(-1.0)
    assert torch.equal(calls[0], logits.argmax(1))
    assert torch.equal(calls[1], logits.argmin(1))
    with pytest.raises(ShapeError, match="saliency_fn"):
        class_sensitivity(lambda *_: blind[0], model, x)


def smooth() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()


def test_meta_saliency_is_that_of_a_model_one_step_on() -> None:
    """To first order in ε, half of what differentiating L - ε |∇L|² adds."""
    model, x = smooth(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]

    def slope(net: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(-net(leaf)[torch.arange(len(classes)), classes].sum(), leaf)[0]

    classes = torch.tensor([0, 2])
    plain = meta_saliency(slope, model, x, classes, eps=0.0)
    torch.testing.assert_close(plain, slope(model, x, classes))
    rows = []
    for i in range(2):
        leaf = x[i : i + 1].clone().requires_grad_()
        inner = torch.autograd.grad(-model(leaf)[0, classes[i]], list(model.parameters()), create_graph=True)
        rows.append(torch.autograd.grad(sum(g.square().sum() for g in inner), leaf)[0])
    eps = 1e-5
    change = (meta_saliency(slope, model, x, classes, eps) - plain) / eps
    torch.testing.assert_close(change, -torch.cat(rows) / 2, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    maps = meta_saliency(partial(normgrad, layers=["0"]), model, x, 1)
    assert maps.shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"layers": ["nowhere"]}, ArgumentError, "layers: the model has no module"),
        ({"layers": "3"}, ArgumentError, "layers: expected a list"),
        ({"layers": []}, ArgumentError, "layers: expected a list"),
        ({"extract": "conv5x5"}, ArgumentError, "extract"),
        ({"aggregate": "mean"}, ArgumentError, "aggregate"),
        ({"combine": "sum"}, ArgumentError, "combine"),
        ({"weights": [1.0]}, ArgumentError, "weights"),
        ({"target": 4}, ArgumentError, "target: expected classes 0..3"),
        ({"target": torch.tensor([0, 1, 2])}, ShapeError, "target"),
        ({"x": torch.randn(3, 8, 8)}, ShapeError, "x: expected pictures"),
        ({"layers": ["8"]}, ShapeError, "layers: expected outputs"),
    ],
)
def test_refusals(arguments, error, match) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    with pytest.raises(error, match=match):
        backprop_saliency(**{"model": model, "x": x, "target": 1, "layers": ["3"]} | arguments)


def test_layers_that_cannot_be_watched_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.dead, self.idle, self.body = nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Identity(), network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.dead(x)
            return self.body(self.relu(self.relu(x)))

    model, x = Odd(), torch.randn(1, 3, 8, 8)
    for name, error, match in (
        ("relu", ArgumentError, "more than once"),
        ("dead", Unsupported, "do not depend"),
        ("idle", Unsupported, "did not run"),
    ):
        with pytest.raises(error, match=match):
            normgrad(model, x, 0, [name])
    assert not any(module._forward_hooks for module in model.modules())
