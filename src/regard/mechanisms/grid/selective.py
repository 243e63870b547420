"""Selective scans of an image in four directions (VMamba, arXiv:2401.10166, as SegMAN has them)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly
from regard.linear import selective_scan
from regard.mechanisms.grid.base import GridMechanism


def cross_scan(x: Tensor) -> Tensor:
    """(B, H, W, C) to its four sequences (B, 4, N, C): by rows, by columns, and both from the end."""
    two = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], 1)
    return torch.cat([two, two.flip(2)], 1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Four sequences (B, 4, N, C) back in their places, summed: (B, H, W, C)."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(2)).unbind(1)
    return rows.unflatten(1, (height, width)) + columns.unflatten(1, (width, height)).transpose(1, 2)


class SelectiveScan2d(GridMechanism):
    """A state space scan over the whole image in four directions: x (B, H, W, C) to the same, at any size.

        (r, B, C)_t = x_t Wx        dt_t = softplus(r_t Wdt + bias)        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t = C_t · h_t + D x_t        summed over the directions `cross_scan`

    A = -exp(A_log) < 0, so what was seen fades with the steps dt, which follow the image. Each direction has its own
    weights. Exact, in time and memory O(N C d_state) (`regard.linear.selective_scan`).

    Args:
        dim: C.
        d_state: numbers per channel in h.
        dt_rank: channels of r, C / 16 rounded up by default.
    """

    cost: ClassVar[str] = "O(N C (dt_rank + d_state))"

    def __init__(self, dim: int, d_state: int = 1, dt_rank: int | None = None):
        super().__init__()
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        for name, value in (("dim", dim), ("d_state", d_state), ("dt_rank", dt_rank)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        self.dim, self.d_state, self.dt_rank = dim, d_state, dt_rank
        self.x_proj = nn.Parameter(torch.empty(4, dt_rank + 2 * d_state, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.dt_proj = nn.Parameter(torch.empty(4, dim, dt_rank).uniform_(-(dt_rank**-0.5), dt_rank**-0.5))
        step = torch.empty(4, dim).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())  # softplus: step
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(4, dim, 1))
        self.D = nn.Parameter(torch.ones(4, dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim or 0 in x.shape:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        u = cross_scan(x)
        low, b, c = (u @ self.x_proj.mT).split([self.dt_rank, self.d_state, self.d_state], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus((low @ self.dt_proj.mT).to(wide) + self.dt_bias.unsqueeze(1))
        y, _ = selective_scan(u, dt, -self.A_log.to(wide).exp(), b, c, self.D)
        return cross_merge(y, x.shape[1], x.shape[2])

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        d_model: int,
        d_state: int = 1,
        expansion_ratio: float = 1.0,
        dt_rank: int | str = "auto",
        k_groups: int = 4,
    ) -> "SelectiveScan2d":
        """Weights of the published ``VSSM``.

        Raises:
            Unsupported: an expansion, or another number of directions, which no published model has.
        """
        if expansion_ratio != 1 or k_groups != 4:
            raise Unsupported(f"expansion_ratio, k_groups: only 1 and 4, got {expansion_ratio} and {k_groups}")
        module = cls(d_model, d_state, None if isinstance(dt_rank, str) else dt_rank)
        load_strictly(module, published_scan(dict(state_dict)))
        return module


def published_scan(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Published weights of a scan by our names and shapes, directions first; the other tensors stay."""
    state = dict(state)
    names = {"x_proj_weight": "x_proj", "dt_projs_weight": "dt_proj", "dt_projs_bias": "dt_bias"}
    for old, new in (names | {"A_logs": "A_log", "Ds": "D"}).items():
        if (tensor := state.pop(prefix + old, None)) is not None:
            if old == "x_proj_weight":
                tensor = tensor.squeeze(-1)
            state[prefix + new] = tensor if old.startswith("dt_") else tensor.unflatten(0, (4, -1))
    return state
