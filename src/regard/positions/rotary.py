"""Rotary position embedding (RoPE, arXiv:2104.09864), rotate-half layout.

    R(p) x = x * cos(p) + rotate_half(x) * sin(p),     rotate_half([x1, x2]) = [-x2, x1]

`cos` and `sin` carry the angles of each position, every angle twice (for the two halves), as Llama-family models
compute them. They may cover only the first `rotary_dim` channels (partial rotary: GPT-NeoX, Phi-3); the rest pass.
"""

import torch
from torch import Tensor

from regard.errors import ArgumentError


def rotary_angles(positions: Tensor, dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles ``p · theta^(-2i/dim)``.

    Args:
        positions: (..., N), any integer or floating type.
        dim: channels to be rotated, even.
        theta: base of the frequencies.

    Returns:
        Two float32 tensors (..., N, dim); the second half of the channels repeats the first.

    Raises:
        ArgumentError: dim is odd.
    """
    if dim % 2:
        raise ArgumentError(f"dim: rotary embedding turns pairs of channels, {dim} is odd")
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (..., N, D) by the angles in `cos`, `sin` (..., N, rotary_dim), which broadcast against it."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = (turned * cos + _rotate_half(turned) * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rotate_tokens(x: Tensor, theta: float | None, past: int = 0, dim: int | None = None, factor: float = 1.0) -> Tensor:
    """Rotate `x` (..., N, D) as the tokens ``past .. past + N - 1`` of a sequence; unchanged where theta is None.

    Args:
        theta: base of the frequencies, see `rotary_angles`.
        dim: rotate only the first so many channels; all by default.
        factor: positions are divided by it, so that a longer context fits (linear scaling, arXiv:2306.15595).
    """
    if theta is None or dim == 0:
        return x
    positions = torch.arange(past, past + x.shape[-2], device=x.device) / factor
    return rotate(x, *rotary_angles(positions, x.shape[-1] if dim is None else dim, theta))


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Invert `rotate`, also where cos and sin carry an attention scaling s (YaRN): cos² + sin² = s²."""
    scale = cos * cos + sin * sin
    return rotate(x, cos / scale, -sin / scale)
