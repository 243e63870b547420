"""Rotary position embedding (RoPE, arXiv:2104.09864), rotate-half layout.

    R(p) x = x * cos(p) + rotate_half(x) * sin(p),     rotate_half([x1, x2]) = [-x2, x1]

`cos` and `sin` carry the angles of each position, every angle twice (for the two halves), as Llama-family models
compute them. They may cover only the first `rotary_dim` channels (partial rotary: GPT-NeoX, Phi-3); the rest pass.
"""

import torch
from torch import Tensor


def _rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (..., N, D) by the angles in `cos`, `sin` (..., N, rotary_dim), which broadcast against it."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * cos + _rotate_half(turned) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Invert `rotate`, also where cos and sin carry an attention scaling s (YaRN): cos² + sin² = s²."""
    scale = cos * cos + sin * sin
    return rotate(x, cos / scale, -sin / scale)
