"""RCMHA against its equations in plain loops; memory, lengths, and its beginning without positions."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.layers.conv import CausalDepthwiseConv1d
from regard.mechanisms.heads.relative_conv import RelativeConvAttention


def module(**config) -> RelativeConvAttention:
    torch.manual_seed(0)
    layer = RelativeConvAttention(**{"dim": 8, "num_heads": 2, "max_length": 12, **config}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def convolved(conv: CausalDepthwiseConv1d, x: torch.Tensor) -> torch.Tensor:
    taps = conv.kernel_size
    rows = []
    for t in range(len(x)):
        seen = [(j, t - taps + 1 + j) for j in range(taps) if t - taps + 1 + j >= 0]
        rows.append(conv.conv.bias + sum(conv.conv.weight[:, 0, j] * x[s] for j, s in seen))
    return torch.stack(rows)


def oracle(layer: RelativeConvAttention, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """One sequence (N, C) after a memory (M, C)."""
    source = torch.cat([memory, x])
    n, m, d = len(x), len(source), layer.head_dim
    out = torch.zeros(n, layer.num_heads, d, dtype=x.dtype)
    for h in range(layer.num_heads):
        rows = slice(h * d, (h + 1) * d)
        q = convolved(layer.q_conv, x @ layer.q_proj.weight[rows].T)
        k = convolved(layer.k_conv, source @ layer.k_proj.weight[rows].T)
        v = convolved(layer.v_conv, source @ layer.v_proj.weight[rows].T + layer.v_proj.bias[rows])
        for i in range(n):
            scores = []
            for j in range(m):
                distance = j - (i + m - n)
                if layer.causal and distance > 0:
                    continue
                e, b = layer.relative_keys[layer.past + distance, h], layer.relative_bias[layer.past + distance, h]
                scores.append(((q[i] + layer.query_bias[h]) @ k[j] + q[i] @ e + b) / d**0.5)
            weights = torch.stack(scores).softmax(0)
            out[i, h] = weights @ v[: len(weights)]
    return layer.o_proj(out.flatten(1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("memory", [0, 3])
def test_it_is_its_equations(causal: bool, memory: int) -> None:
    layer = module(causal=causal)
    x, earlier = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, memory, 8, dtype=torch.float64)
    got = layer(x, memory=earlier) if memory else layer(x)
    torch.testing.assert_close(got, torch.stack([oracle(layer, *pair) for pair in zip(x, earlier, strict=True)]))


def test_gradients() -> None:
    layer = module()
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_it_begins_without_positions() -> None:
    """Zero tables: without the convolution's neighbours, keys may be shuffled."""
    torch.manual_seed(0)
    layer = RelativeConvAttention(8, 2, kernel_size=1, max_length=12, causal=False)
    x = torch.randn(1, 6, 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_convolution_sees_the_past_only_and_streams(taps: int) -> None:
    torch.manual_seed(0)
    conv = CausalDepthwiseConv1d(3, taps).double()
    x = torch.randn(2, 5, 9, 3, dtype=torch.float64)
    want = torch.stack([torch.stack([convolved(conv, row) for row in item]) for item in x])
    torch.testing.assert_close(conv(x), want)
    state, got = None, []
    for piece in x.split([4, 1, 1, 3], dim=2):
        y, state = conv.stream(piece, state)
        got.append(y)
    torch.testing.assert_close(torch.cat(got, 2), want)


def test_too_long_and_bad_arguments() -> None:
    with pytest.raises(ShapeError, match="13 tokens are more than max_length = 12"):
        module()(torch.randn(1, 13, 8, dtype=torch.float64))
    with pytest.raises(ShapeError, match="memory: expected"):
        module()(torch.randn(1, 3, 8, dtype=torch.float64), memory=torch.randn(1, 3, 7))
    with pytest.raises(ArgumentError, match="kernel_size"):
        module(kernel_size=0)
    with pytest.raises(ArgumentError, match="max_length"):
        module(max_length=0)
