"""Lightning attention against its double sum; its slopes; its model."""

import pytest
import torch

from regard.errors import ArgumentError
from regard.mechanisms.linear.lightning import LightningAttention, lightning_slopes
from regard.models.language.transnormer import TransNormerLLM


def test_it_is_its_double_sum() -> None:
    torch.manual_seed(0)
    layer = LightningAttention(8, 2, layer_idx=1, num_layers=3).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    silu = torch.nn.functional.silu
    q, k, v = (silu(p(x)).unflatten(-1, (2, 4)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = torch.zeros(1, 9, 2, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(9):
            for j in range(i + 1):
                weight = torch.exp(-layer.slopes[h].double() * (i - j)) * (q[0, i, h] @ k[0, j, h])
                out[0, i, h] += weight * v[0, j, h]
    gate = (x @ layer.gate_proj[0].weight.T @ layer.gate_proj[1].weight.T).sigmoid()
    torch.testing.assert_close(layer(x), layer.o_proj(layer.norm(out.flatten(2)) * gate))


def test_slopes() -> None:
    torch.testing.assert_close(lightning_slopes(4), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
    # three heads: two of the powers for 2, and the first of those for 4
    torch.testing.assert_close(lightning_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    torch.testing.assert_close(lightning_slopes(3, rule="minimax"), 2.0 ** (-8 * torch.tensor([1.0, 2.0, 3.0]) / 3))
    layers = torch.stack([lightning_slopes(4, layer, 3) for layer in range(3)])
    torch.testing.assert_close(layers[:, 0], torch.tensor([1 + 1e-5, 0.5 + 1e-5, 1e-5]) / 4)


def test_gradients() -> None:
    torch.manual_seed(0)
    layer = LightningAttention(4, 2, relative=True).double()
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-4)  # the angles of positions are float32


def test_the_state_does_not_grow() -> None:
    layer = LightningAttention(16, 2)
    sizes = [layer.stream(torch.randn(1, n, 16))[1].sums.numel() for n in (1, 10, 1000)]
    assert sizes == [2 * 8 * 8] * 3


def test_the_model_sees_no_future() -> None:
    torch.manual_seed(0)
    model = TransNormerLLM(30, 16, 2, 2, 24)
    ids = torch.randint(0, 30, (2, 12))
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 30
    torch.testing.assert_close(model(other)[:, :7], model(ids)[:, :7])
    assert not torch.allclose(model(other)[:, 7:], model(ids)[:, 7:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gate": "none"}, "gate: expected one of"),
        ({"norm": "batch"}, "norm: expected one of"),
        ({"slopes": "flat"}, "slopes: expected one of"),
        ({"layer_idx": 3, "num_layers": 3}, "layer_idx: expected 0 to 2, got 3"),
        ({"num_heads": 3}, "3 heads do not divide"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        LightningAttention(**{"dim": 16, "num_heads": 2, **config})
