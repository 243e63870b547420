"""MALA against its sums; the claim about magnitudes; the backbone's sizes."""

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError
from regard.linear import elu1
from regard.mechanisms.linear.mala import (
    GridMagnitudeAwareAttention,
    MagnitudeAwareLinearAttention,
    magnitude_aware_linear_attention,
)


def weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """A (N, M) of one head, straight from the score form."""
    n, scale = q.shape[0], q.shape[1] ** -0.5
    rows = []
    for i in range(n):
        seen = i + 1 if causal else k.shape[0]
        scores = torch.stack([scale / seen * (q[i] @ k[j]) for j in range(seen)])
        z = scores.sum()
        row = (1 + 1 / (z + 1e-6)) * scores - z / seen
        rows.append(torch.cat([row, row.new_zeros(k.shape[0] - seen)]))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_its_score_form(causal: bool) -> None:
    torch.manual_seed(0)
    q, k = elu1(torch.randn(2, 7, 4, dtype=torch.float64)), elu1(torch.randn(2, 7, 4, dtype=torch.float64))
    v = torch.randn(2, 7, 3, dtype=torch.float64)
    want = torch.stack([weights(q[h], k[h], causal) @ v[h] for h in range(2)])
    got, _ = magnitude_aware_linear_attention(q[None], k[None], v[None], causal=causal)
    torch.testing.assert_close(got[0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_and_sharpen_with_the_query(causal: bool) -> None:
    """Four times the query: the weights spread further, while those of normalised linear attention stay."""
    torch.manual_seed(0)
    q, k = elu1(torch.randn(1, 1, 9, 4).double()), elu1(torch.randn(1, 1, 9, 4).double())
    eye = torch.eye(9, dtype=torch.float64)[None, None]
    rows, _ = magnitude_aware_linear_attention(q, k, eye, causal=causal)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 1, 9, dtype=torch.float64), atol=1e-5, rtol=0)
    longer, _ = magnitude_aware_linear_attention(4 * q, k, eye, causal=causal)
    assert (longer[0, 0, 2:].std(-1) > 1.05 * rows[0, 0, 2:].std(-1)).all()
    linear = [(s * q @ k.mT) / (s * q @ k.mT).sum(-1, keepdim=True) for s in (1, 4)]
    torch.testing.assert_close(*linear)


def test_the_layer_is_gated_and_adds_local_values() -> None:
    torch.manual_seed(0)
    layer = MagnitudeAwareLinearAttention(8, 2, causal=False, rope_theta=None).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k = elu1(layer.q_proj(x)).unflatten(-1, (2, 4)), elu1(layer.k_proj(x)).unflatten(-1, (2, 4))
    v = layer.v_proj(x)
    heads = [weights(q[0, :, h], k[0, :, h], False) @ v[0].unflatten(-1, (2, 4))[:, h] for h in range(2)]
    y = torch.cat(heads, -1) + layer.lepe(v.mT).mT[0]
    torch.testing.assert_close(layer(x)[0], layer.o_proj(y * layer.gate_proj(x)[0]))


def test_gradients() -> None:
    torch.manual_seed(0)
    for causal in (False, True):
        layer = MagnitudeAwareLinearAttention(4, 2, causal=causal, rope_theta=None, lepe_kernel=3).double()
        x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
    layer = GridMagnitudeAwareAttention(8, 2).double()
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-4)  # angles are float32


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mala-tiny", 16.449), ("mala-small", 27.143), ("mala-base", 49.793), ("mala-large", 97.766)],
)
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = regard.create(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)


def test_the_backbone_takes_any_size() -> None:
    torch.manual_seed(0)
    model = regard.create(
        "mala/model", num_classes=3, in_chans=1, dims=(8, 8, 16, 16), depths=(1,) * 4, num_heads=(1, 2, 2, 4)
    ).eval()
    images = torch.randn(2, 1, 45, 33)
    assert model(images).shape == (2, 3)
    assert [tuple(f.shape[1:]) for f in model.forward_features(images)] == [
        (12, 9, 8),
        (6, 5, 8),
        (3, 3, 16),
        (2, 2, 16),
    ]


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="lepe_kernel"):
        MagnitudeAwareLinearAttention(8, 2, lepe_kernel=4)
    with pytest.raises(ArgumentError, match="multiple of 4"):
        GridMagnitudeAwareAttention(12, 2)
    with pytest.raises(ShapeError, match="x: expected"):
        GridMagnitudeAwareAttention(8, 2)(torch.randn(1, 6, 8))
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("mala/model", depths=(1, 1))
    with pytest.raises(ShapeError, match="images"):
        regard.create("mala-tiny")(torch.randn(1, 1, 32, 32))
