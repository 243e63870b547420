"""ComplexFormer against the explicit cosine, and what it is for plain angles."""

import math

import pytest
import torch

from regard.errors import ArgumentError
from regard.mechanisms.heads.complexformer import ComplexAttention, as_vectors
from regard.positions import rotary_angles, rotate


def module(**config) -> ComplexAttention:
    torch.manual_seed(0)
    layer = ComplexAttention(**{"dim": 12, "num_heads": 2, **config}).double()
    with torch.no_grad():
        layer.delta.normal_()
        layer.phase_bias.normal_()
    return layer


def oracle(layer: ComplexAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence (N, C), with the cosine of every pair."""
    n, d = len(x), layer.head_dim
    out = torch.zeros(n, layer.num_heads, d, dtype=x.dtype)
    for h in range(layer.num_heads):
        rows = slice(h * d, (h + 1) * d)
        q, k, v = (x @ proj.weight[rows].T for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        qz, kz = (torch.complex(t[:, : d // 2], t[:, d // 2 :]) for t in (q, k))
        for m in range(n):
            scores = []
            for j in range(m + 1 if layer.causal else n):
                angle = layer.delta[h] * (qz[m].angle() - kz[j].angle()) + layer.phase_bias[h]
                angle = angle + (m - j) * layer.frequencies
                scores.append((qz[m].abs() * kz[j].abs() * angle.cos()).sum() * layer.scale)
            weights = torch.stack(scores).softmax(0)
            out[m, h] = weights @ v[: len(weights)]
    return out.flatten(1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_cosine_of_every_pair(causal: bool) -> None:
    layer = module(causal=causal, scale=0.7)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([oracle(layer, item) for item in x]), atol=1e-6, rtol=1e-6)


def test_with_plain_angles_it_is_rotary_attention() -> None:
    layer = module(dim=16)
    with torch.no_grad():
        layer.delta.fill_(1.0)
        layer.phase_bias.zero_()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    angles = rotary_angles(torch.arange(9), 8)
    q, k = rotate(q, *angles), rotate(k, *angles)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(layer(x), layer.o_proj(want.transpose(1, 2).flatten(2)), atol=1e-4, rtol=1e-4)


def test_only_differences_of_positions_matter() -> None:
    layer = module()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    (q0, k0, _), (q7, k7, _) = layer.prepare(x), layer.prepare(x, past=7)
    torch.testing.assert_close(q0 @ k0.mT, q7 @ k7.mT)
    assert not torch.allclose(q0, q7)


def test_gradients_also_where_a_number_is_zero() -> None:
    layer = module()
    x = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    zero = torch.zeros(1, 1, 2, 4, requires_grad=True)
    as_vectors(zero, torch.ones(1, 2), torch.zeros(2, 2)).sum().backward()
    assert bool(zero.grad.isfinite().all())
    assert math.isclose(
        as_vectors(zero, torch.ones(1, 2), torch.zeros(2, 2)).norm().item(), 2 * 1e-9**0.5, rel_tol=1e-3
    )


def test_it_adds_one_channel_of_parameters() -> None:
    counted = sum(p.numel() for p in ComplexAttention(64, 4).parameters())
    assert counted == 4 * 64 * 64 + 2 * 4 * 8


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="even head_dim, got 3"):
        module(num_heads=4)
