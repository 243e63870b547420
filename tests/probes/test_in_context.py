"""What heads of in-context regression compute, read off weights made by hand."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.heads.in_context import InContextAttention
from regard.probes.in_context import circuit_statistics, extract_circuits
from regard.tasks.in_context import LinearRegressionTask, softmax_kernel


def by_hand(d: int, omega: torch.Tensor, mu: torch.Tensor) -> InContextAttention:
    """The model that theory says training ends in."""
    model, e = InContextAttention(d + 1, len(omega)), d + 1
    layer = model.layers[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for h in range(len(omega)):
            part = slice(h * e, h * e + d)
            layer.q_proj.weight[part, :d] = omega[h] * e**0.5 * torch.eye(d)
            layer.k_proj.weight[part, :d] = torch.eye(d)
            layer.v_proj.weight[h * e, d] = 1
            layer.o_proj.weight[0, h * e] = mu[h]
    return model


def test_statistics_of_a_model_made_by_hand() -> None:
    omega, mu = torch.tensor([0.2, -0.1, 0.0]), torch.tensor([2.0, -1.5, 0.0])
    model = by_hand(4, omega, mu)
    found = circuit_statistics(*extract_circuits(model), 4)
    torch.testing.assert_close(found.omega, omega)
    torch.testing.assert_close(found.mu, mu)
    for zero in (found.omega_variance, found.other_kq, found.other_ov):
        assert zero.abs().max() < 1e-7
    assert [found.mu_sum.item(), found.mu_positive.item(), found.mu_negative.item()] == [0.5, 2.0, -1.5]
    z_q, z, _ = LinearRegressionTask(4, 20).sample(8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(z_q, z), softmax_kernel(z_q, z, omega, mu))


def test_every_entry_is_where_it_belongs() -> None:
    KQ, OV = torch.zeros(1, 4, 4), torch.zeros(1, 4, 1)
    KQ[0].diagonal()[:3] = torch.tensor([2.0, 4.0, 6.0])  # by √E = 2: 1, 2, 3
    KQ[0, 1, 3], KQ[0, 3, 3], OV[0, 2, 0], OV[0, 3, 0] = -5.0, 100.0, -7.0, 3.0
    found = circuit_statistics(KQ, OV, 3)
    assert found.omega.item() == pytest.approx(2)
    assert found.omega_variance.item() == pytest.approx(2 / 3)
    assert found.other_kq.item() == 2.5  # the row of the label meets zeros only
    assert (found.mu.item(), found.other_ov.item()) == (3, 7)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="model: expected one layer, got 2"):
        extract_circuits(InContextAttention(4, 2, num_layers=2))
    with pytest.raises(ShapeError, match="KQ: expected"):
        circuit_statistics(torch.zeros(2, 4, 4), torch.zeros(2, 4, 1), 4)
    with pytest.raises(ShapeError, match="OV: expected"):
        circuit_statistics(torch.zeros(2, 5, 5), torch.zeros(2, 5, 2), 4)
