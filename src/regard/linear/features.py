"""Feature maps φ, for which ``φ(q)·φ(k)`` stands in for ``exp(q·k)``."""

import torch
from torch import Tensor
from torch.nn import functional as F


def elu1(x: Tensor) -> Tensor:
    """``ELU(x) + 1``, positive (arXiv:2006.16236)."""
    return F.elu(x) + 1


def taylor(x: Tensor) -> Tensor:
    """(..., D) to (..., 1 + D + D²) with ``φ(q)·φ(k) = 1 + q·k + (q·k)²/2``, the exponential's first terms."""
    squares = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1)
