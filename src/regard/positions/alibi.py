"""Attention with linear biases (ALiBi, arXiv:2108.12409): a slope per head."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """(H,) slopes ``2^(-8h/H)``, h = 1..H; where H is no power of two, every other one of the next power fills up."""

    def powers(heads: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]

    whole = 2 ** int(math.log2(num_heads))
    return torch.tensor(powers(whole) + powers(2 * whole)[0::2][: num_heads - whole])
