"""Compressed convolutional attention against its equations in plain loops."""

import pytest
import torch

from regard.errors import ArgumentError
from regard.mechanisms.heads.compressed_conv import CompressedConvAttention
from regard.mechanisms.softmax import SoftmaxAttention
from regard.positions import rotary_angles, rotate


def module(**config) -> CompressedConvAttention:
    torch.manual_seed(0)
    layer = CompressedConvAttention(**{"dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, **config}).double()
    with torch.no_grad():
        layer.temperature.uniform_(0.5, 2.0)
    return layer


def oracle(layer: CompressedConvAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence (N, C), token by token."""
    n, (t0, t1) = len(x), (layer.conv_depthwise.kernel_size[0], layer.conv_grouped.kernel_size[0])
    heads, groups, d = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q0, k0 = x @ layer.q_proj.weight.T, x @ layer.k_proj.weight.T
    u = torch.cat([torch.zeros(t0 + t1 - 2, (heads + groups) * d, dtype=x.dtype), torch.cat([q0, k0], 1)])
    first = torch.stack(
        [
            layer.conv_depthwise.bias + sum(layer.conv_depthwise.weight[:, 0, j] * u[i + j] for j in range(t0))
            for i in range(len(u) - t0 + 1)
        ]
    )
    second = torch.zeros(n, (heads + groups) * d, dtype=x.dtype)
    for i in range(n):
        for h in range(heads + groups):
            rows = slice(h * d, (h + 1) * d)
            filters = layer.conv_grouped.weight[rows]
            second[i, rows] = layer.conv_grouped.bias[rows] + sum(
                filters[:, :, j] @ first[i + j, rows] for j in range(t1)
            )
    v1, v2 = x @ layer.v_proj_current.weight.T, x @ layer.v_proj_delayed.weight.T
    v = torch.cat([v1, torch.cat([torch.zeros_like(v2[:1]), v2[:-1]])], 1).view(n, groups, d)
    ratio = heads // groups
    out = torch.zeros(n, heads, d, dtype=x.dtype)
    means = [(q0[:, h * d : (h + 1) * d] + k0[:, h // ratio * d : (h // ratio + 1) * d]) / 2 for h in range(heads)]
    angles = rotary_angles(torch.arange(n), 2, 50.0)
    for h in range(heads):
        g = h // ratio
        q = second[:, h * d : (h + 1) * d] + means[h]
        k = second[:, (heads + g) * d : (heads + g + 1) * d] + sum(means[g * ratio : (g + 1) * ratio]) / ratio
        q = d**0.5 * q / q.norm(dim=1, keepdim=True)
        k = layer.temperature[g] * d**0.5 * k / k.norm(dim=1, keepdim=True)
        q, k = rotate(q, *angles), rotate(k, *angles)
        for i in range(n):
            out[i, h] = (q[i] @ k[: i + 1].T / d**0.5).softmax(0) @ v[: i + 1, g]
    return out.flatten(1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("kernels", [(2, 2), (1, 3), (4, 1)])
def test_it_is_its_equations(kernels) -> None:
    layer = module(kernel_sizes=kernels, rope_theta=50.0)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    # the angles are float32 inside the layer, as in every rotary model
    torch.testing.assert_close(layer(x), torch.stack([oracle(layer, item) for item in x]), atol=1e-6, rtol=1e-6)


def test_gradients() -> None:
    layer = module()
    x = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_the_cache_is_as_small_as_promised() -> None:
    layer = module()
    _, state = layer.stream(torch.randn(1, 50, 12, dtype=torch.float64))
    assert state.kv.key.numel() + state.kv.value.numel() == 50 * 2 * 2 * 4
    assert state.latent.shape == (1, 2, 24)


def test_parameters_are_counted() -> None:
    layer = CompressedConvAttention(64, 4, 2, 8, kernel_sizes=(2, 3))
    latent = (4 + 2) * 8
    projections = 64 * (4 * 8 + 2 * 8 + 2 * 8) + 4 * 8 * 64
    convolutions = latent * 2 + latent + latent * 8 * 3 + latent
    assert sum(p.numel() for p in layer.parameters()) == projections + convolutions + 2


def test_compression_of_a_multi_head_attention() -> None:
    layer = CompressedConvAttention.from_compression(256, 16, query_factor=2, kv_factor=8)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (8, 2, 16)
    full = SoftmaxAttention(256, 16)
    assert layer.k_proj.weight.numel() * 8 == full.k_proj.weight.numel()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: 3 key heads do not divide 4"),
        ({"kernel_sizes": (0, 2)}, "kernel_sizes"),
        ({"rope_fraction": 2.0}, "rope_fraction"),
        ({"num_kv_heads": 1, "head_dim": 3}, "must be even"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        module(**config)


def test_bad_compression() -> None:
    with pytest.raises(ArgumentError, match="kv_factor: 3 does not divide 16"):
        CompressedConvAttention.from_compression(256, 16, query_factor=2, kv_factor=3)
