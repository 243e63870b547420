"""What the heads of a trained layer of in-context regression compute (arXiv:2503.12734)."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.heads.in_context import Circuits, InContextAttention


class CircuitStatistics(NamedTuple):
    """How near heads come to y = Σ_h μ_h Σ_l softmax_l(ω_h x_qᵀx_l) y_l, each (H,), and over heads.

    Attributes:
        omega: mean of KQ's diagonal on x, by √E.
        omega_variance: of that diagonal, by E.
        other_kq: the largest magnitude among KQ's other entries, by √E. The label's row does not count, because a
            query's label is 0.
        mu: OV's entry for the label.
        other_ov: the largest magnitude among the others.
        mu_sum: |Σ_h μ_h|, a number; 0 takes the examples' mean off.
        mu_positive, mu_negative: totals of the heads of each sign.
    """

    omega: Tensor
    omega_variance: Tensor
    other_kq: Tensor
    mu: Tensor
    other_ov: Tensor
    mu_sum: Tensor
    mu_positive: Tensor
    mu_negative: Tensor


def extract_circuits(model: InContextAttention) -> Circuits:
    """KQ (H, E, E) and OV (H, E, n_out) of a model of one layer.

    Raises:
        ArgumentError: the model has more layers; theirs are ``model.layers[i].circuits()``.
    """
    if model.num_layers != 1:
        raise ArgumentError(f"model: expected one layer, got {model.num_layers}; see model.layers[i].circuits()")
    with torch.no_grad():
        return model.layers[0].circuits()  # type: ignore[operator,no-any-return]


def circuit_statistics(KQ: Tensor, OV: Tensor, d: int) -> CircuitStatistics:
    """Statistics of the circuits of tokens [x; y], with x the first d channels and one label.

    Args:
        KQ: (H, d + 1, d + 1).
        OV: (H, d + 1, 1).
        d: channels of x.

    Raises:
        ShapeError: other shapes.
    """
    if KQ.dim() != 3 or KQ.shape[1:] != (d + 1, d + 1):
        raise ShapeError(f"KQ: expected (H, {d + 1}, {d + 1}), got {tuple(KQ.shape)}")
    if OV.shape != (KQ.shape[0], d + 1, 1):
        raise ShapeError(f"OV: expected ({KQ.shape[0]}, {d + 1}, 1), got {tuple(OV.shape)}")
    scaled = KQ / (d + 1) ** 0.5
    diagonal = scaled.diagonal(0, 1, 2)[:, :d]
    rest = scaled[:, :d].clone()
    rest.diagonal(0, 1, 2).zero_()
    mu = OV[:, d, 0]
    return CircuitStatistics(
        omega=diagonal.mean(1),
        omega_variance=diagonal.var(1, correction=0),
        other_kq=rest.abs().amax((1, 2)),
        mu=mu,
        other_ov=OV[:, :d].abs().amax((1, 2)),
        mu_sum=mu.sum().abs(),
        mu_positive=mu.clamp(min=0).sum(),
        mu_negative=mu.clamp(max=0).sum(),
    )
