"""Gaussian adaptive attention against its equations, number by number."""

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.gates.gaussian import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from regard.models.multimodal.gaussian_adaptive import GaussianAdaptiveTransformer


def layer(axis: int = -1, num_heads: int = 3, num_gaussians: int = 2, **changes) -> GaussianAdaptiveAttention:
    torch.manual_seed(0)
    module = GaussianAdaptiveAttention(axis, num_heads, num_gaussians, **changes).double()
    torch.nn.init.normal_(module.mean_offsets)
    return module


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive_row(module: GaussianAdaptiveAttention, row: list[float], padding: float | None) -> list[float]:
    heads, out = module.num_heads, []
    size = len(row) // heads
    for h in range(heads):
        z = row[h * size :] if h == heads - 1 else row[h * size : (h + 1) * size]
        known = [0.0 if padding is not None and v == padding else v for v in z]
        mean = sum(known) / len(z)
        variance = sum((v - mean) ** 2 for v in known) / (len(z) - 1) + 1e-8
        densities = []
        for v in z:
            g = 1.0
            for delta, c in zip(module.mean_offsets[h].tolist(), module.c[h].tolist(), strict=True):
                g *= math.exp(-((v - mean - delta) ** 2 / variance) / (2 * c * c)) / math.sqrt(2 * math.pi * c * c)
            densities.append(g)
        total = max(sum(densities), 1e-8)
        out += [v if padding is not None and v == padding else v * g / total for v, g in zip(z, densities, strict=True)]
    return out


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("padding", [None, 0.0, -1.0])
def test_is_the_equation_along_any_axis(axis: int, padding: float | None) -> None:
    module, x = layer(axis, padding_value=padding), values(7, 8, 10)
    if padding is not None:
        x[:, 3, 4:6] = padding
    y = module(x)
    rows = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    want = torch.tensor([naive_row(module, row.tolist(), padding) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(y.movedim(axis, -1).reshape(rows.shape), want, atol=1e-12, rtol=0)


def test_weights_sum_to_one_and_do_not_know_the_order() -> None:
    module, x = layer(num_heads=1), values(4, 9)
    y, weights = module(x, return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(y, x * weights)
    order = torch.randperm(9)
    torch.testing.assert_close(module(x[:, order]), y[:, order])


def test_gaussians_multiply_to_one_of_the_summed_precision() -> None:
    several, one, x = layer(num_heads=1, num_gaussians=3), layer(num_heads=1, num_gaussians=1), values(4, 9)
    with torch.no_grad():
        several.mean_offsets.zero_()
        one.mean_offsets.zero_()
        one.c.copy_(several.c.square().reciprocal().sum().rsqrt())
    torch.testing.assert_close(several(x), one(x))


def test_a_mask_is_the_published_sentinel_of_zero_whatever_the_padding_holds() -> None:
    x, valid = values(3, 12), torch.ones(3, 12, dtype=torch.bool)
    valid[1, 7:] = valid[2, 2] = False
    want = layer(padding_value=0.0)(x * valid)
    rubbish = x.masked_fill(~valid, 50.0)
    got = layer()(rubbish, valid)
    torch.testing.assert_close(got[valid], want[valid])
    assert torch.equal(got[~valid], rubbish[~valid])


def test_the_block_adds_residuals() -> None:
    torch.manual_seed(0)
    block, x = GaussianBlock([1, -1], [2, 3], [2, 1]).double(), values(2, 6, 8)
    first, second = block.layers
    middle = x + first(x)
    y, weights = block(x, return_weights=True)
    torch.testing.assert_close(y, middle + second(middle))
    torch.testing.assert_close(weights[1], second(middle, return_weights=True)[1])
    assert sum(p.numel() for p in block.parameters()) == 2 * 2 * 2 + 2 * 3 * 1


def test_gradients_also_where_a_width_is_zero() -> None:
    module, x = layer(), values(2, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    with torch.no_grad():
        module.c[0, 0] = 0.0
    module(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *module.parameters()))


def test_importance_factor() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.5], [0.3, 0.2, 0.5]])
    torch.testing.assert_close(importance_factor(weights, 1), torch.tensor([0.0, 1 / 3, 1.0]))
    torch.testing.assert_close(importance_factor(weights.T, 0), torch.tensor([0.0, 1 / 3, 1.0]))
    assert importance_factor(torch.ones(2, 3), 1).tolist() == [0, 0, 0]


def test_the_classifier_ignores_padding_and_trains() -> None:
    torch.manual_seed(0)
    model = GaussianAdaptiveTransformer(3, 16)
    features = torch.randn(2, 4, 5, 16)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    logits = model(features, valid)
    torch.testing.assert_close(logits[1:], model(features[1:, :, :3]))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="num_gaussians"):
        GaussianAdaptiveAttention(1, 2, 0)
    with pytest.raises(ShapeError, match="3 heads need 6"):
        layer()(values(2, 5))
    with pytest.raises(ShapeError, match="numbered 2"):
        layer(2)(values(8, 8))
    with pytest.raises(ShapeError, match="valid"):
        layer()(values(2, 8), torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="num_heads: expected one for each of 2"):
        GaussianBlock([0, 1], [1])
    with pytest.raises(ArgumentError, match="variant"):
        GaussianBlock.from_official({}, variant="GAT")
    kwargs = {"norm_axes": [1], "num_heads": [1], "num_gaussians": [2]}
    state = {"layers.0.attention_heads.0.c": torch.ones(2), "layers.0.attention_heads.0.mean_offsets": torch.ones(2)}
    with pytest.raises(ArgumentError, match="unexpected layers"):
        GaussianBlock.from_official({**state, "layers.1.attention_heads.0.c": torch.ones(2)}, **kwargs)
    state.popitem()
    with pytest.raises(ArgumentError, match="missing mean_offsets"):
        GaussianBlock.from_official(state, **kwargs)
    with pytest.raises(ArgumentError, match="num_layers"):
        GaussianBlock.from_official(state, num_layers=2, **kwargs)
    with pytest.raises(ShapeError, match="features"):
        GaussianAdaptiveTransformer(3, 16)(torch.zeros(2, 4, 16))
