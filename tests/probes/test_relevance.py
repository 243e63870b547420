"""Relevance propagation against sums over every pair of input and output, zennit; conservation; refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.probes import lrp
from tests.zennit_shim import zennit

RULES = ("z", "zplus", "epsilon")


def network(bias: bool = True, inplace: bool = False, stride: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride, padding=1, bias=bias),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, groups=1, bias=bias), nn.ReLU(inplace), nn.Dropout()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20 if stride == 1 else 5, 6, bias=bias),
        nn.ReLU(inplace),
        nn.Linear(6, 4, bias=bias),
    )


def naive(layers: list[nn.Module], x: torch.Tensor, target: int, rule: str, epsilon: float = 1e-6) -> torch.Tensor:
    """One picture, float64: every layer as a matrix, and the published sums over it in loops."""
    values = [x[None]]
    for layer in layers:
        values.append(layer(values[-1].clone()).detach())
    relevance = torch.zeros_like(values[-1])
    relevance[0, target] = values[-1][0, target]
    for layer, before, after in zip(reversed(layers), reversed(values[:-1]), reversed(values[1:]), strict=True):
        if isinstance(layer, nn.ReLU | nn.Flatten | nn.Dropout):
            relevance = relevance.reshape(before.shape)
            continue
        a, y, r = before.flatten(), after.flatten(), relevance.flatten()
        found = torch.zeros_like(a)
        if isinstance(layer, nn.MaxPool2d):
            winners = F.max_pool2d(before, layer.kernel_size, layer.stride, return_indices=True)[1].flatten(2)
            area = before.shape[2] * before.shape[3]
            for j, winner in enumerate(winners.flatten().tolist()):
                channel = j // winners.shape[2]
                found[channel * area + winner] += r[j] * (y[j] / (y[j] + 1e-9) if rule == "z" else 1)
        else:
            zero = layer(torch.zeros_like(before)).flatten()
            basis = torch.eye(a.numel(), dtype=a.dtype).view(-1, *before.shape[1:])
            matrix = (layer(basis).flatten(1) - zero).detach()  # inputs by outputs
            positive = not isinstance(layer, nn.AvgPool2d)
            positive = positive and (rule == "zplus" or (rule == "z" and isinstance(layer, nn.Linear)))
            for j in range(y.numel()):
                w = matrix[:, j].clamp(min=0) if positive else matrix[:, j]
                z = float((a * w).sum()) if positive else float(y[j])
                z += (epsilon if z >= 0 else -epsilon) if rule == "epsilon" else 1e-9
                found += a * w * r[j] / z
        relevance = found.view(before.shape)
    return relevance[0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_sums_over_every_pair(rule, stride) -> None:
    model = network(stride=stride, inplace=True).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    got = lrp(model, x, torch.tensor([2, 1]), rule)
    layers = [layer for layer in model.eval().modules() if not isinstance(layer, nn.Sequential)]
    want = torch.stack([naive(layers, one, target, rule) for one, target in zip(x, (2, 1), strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_overlapping_windows_that_share_a_winner() -> None:
    """The published code unpools, so that one window's share stays; the other rules keep all of it."""
    pool, linear = nn.MaxPool2d(3, 2), nn.Linear(9, 2)
    model, x = nn.Sequential(pool, nn.Flatten(), linear), torch.rand(3, 1, 8, 8)
    assert all(len(set(one.flatten().tolist())) < 9 for one in F.max_pool2d(x, 3, 2, return_indices=True)[1])
    pooled, winners = F.max_pool2d(x, 3, 2, return_indices=True)
    above = lrp(model[1:], pooled, 0)
    want = x * F.max_unpool2d(above / (pooled + 1e-9), winners, 3, 2, output_size=(8, 8))
    torch.testing.assert_close(lrp(model, x, 0), want)
    torch.testing.assert_close(lrp(model, x, 0, "zplus").sum(), lrp(model[1:], pooled, 0, "zplus").sum())
    assert not torch.allclose(want.sum(), above.sum())


@pytest.mark.parametrize("rule", RULES)
def test_relevance_is_conserved_without_biases(rule) -> None:
    model = network(bias=False).double()
    for parameter in model.parameters():
        parameter.data.abs_()  # so that Z > 0 everywhere
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    logits = model.eval()(x)
    torch.testing.assert_close(lrp(model, x, rule=rule).sum((1, 2, 3)), logits.amax(1), rtol=1e-4, atol=0)


def test_the_linear_layer_gives_the_whole_logit_to_its_input() -> None:
    torch.manual_seed(0)
    x, linear = torch.rand(50, 30), nn.Linear(30, 7)
    logits = linear(x)
    torch.testing.assert_close(lrp(linear, x).sum(1), logits.amax(1), rtol=1e-4, atol=0)
    linear.weight.data.neg_().clamp_(max=0)  # no positive weight: the relevance is lost
    assert not lrp(linear, x).any()


def test_an_inner_layer_is_the_rest_of_the_model() -> None:
    """Relevance at layer k, carried on through the first k layers, is that at the input."""
    model, x = network(bias=False).double().eval(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    inner = lrp(model[3:], model[:3](x).detach(), 1)
    assert inner.shape == (1, 4, 4, 4)
    torch.testing.assert_close(inner.sum(), lrp(model[6:], model[:6](x).detach(), 1).sum(), rtol=1e-6, atol=0)


def composite(rule: object) -> object:
    base = zennit.composites.layer_map_base()
    return zennit.composites.LayerMapComposite([*base, ((zennit.types.Linear,), rule)])


def test_agrees_with_zennit_and_takes_its_composites() -> None:
    model, x = network().double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    before = [hook for module in model.modules() for hook in module._forward_hooks]
    for name, rule in (
        ("epsilon", zennit.rules.Epsilon(1e-6)),
        ("zplus", zennit.rules.ZPlus(1e-9, zero_params="bias")),
    ):
        want = lrp(model, x, torch.tensor([0, 3]), composite(rule))
        torch.testing.assert_close(lrp(model, x, torch.tensor([0, 3]), name), want, rtol=1e-4, atol=1e-8)
    gamma = lrp(model, x, 1, zennit.composites.EpsilonGammaBox(low=0.0, high=1.0))
    assert gamma.shape == x.shape
    assert not torch.allclose(gamma, lrp(model, x, 1, "epsilon"))
    assert [hook for module in model.modules() for hook in module._forward_hooks] == before


def test_the_model_and_the_picture_stay_as_they_were() -> None:
    model = network(inplace=True).train()
    model[3].eval()
    before = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(2, 3, 8, 8)
    kept = x.clone()
    first = lrp(model, x, 1)
    assert torch.equal(first, lrp(model, x, 1))  # no dropout
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, kept)
    torch.testing.assert_close(first[1:], lrp(model, x[1:], 1))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rule": "gamma"}, ArgumentError, "rule: expected z, zplus, epsilon or a composite"),
        ({"rule": None}, ArgumentError, "rule"),
        ({"epsilon": 0.0}, ArgumentError, "epsilon"),
        ({"target": 4}, ArgumentError, "target: expected classes 0..3"),
        ({"model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))}, Unsupported, "no rule for BatchNorm2d"),
        ({"model": nn.Conv2d(3, 4, 3)}, ShapeError, "logits"),
    ],
)
def test_refusals(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        lrp(**{"model": network(), "x": torch.rand(2, 3, 8, 8), "target": 1} | arguments)
