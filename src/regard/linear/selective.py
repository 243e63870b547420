"""Selective scans: states whose decay is an input, one for each channel (Mamba, arXiv:2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = C_t · h_t + D u_t

`linear_scan` is the recurrence beneath: neighbours are joined in pairs, the half as long sequence is scanned likewise,
and what lies between is filled in. So it takes O(N) operations in O(log N) steps, forward and backward, and no product
of decays is ever divided by another.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ShapeError


class ScanResult(NamedTuple):
    """
    Attributes:
        out: (..., N, C).
        state: (..., C, S) after the last token, in float32 or wider.
    """

    out: Tensor
    state: Tensor


def linear_scan(decay: Tensor, added: Tensor) -> Tensor:
    """``h_t = decay_t h_{t-1} + added_t`` from ``h_{-1} = 0``, along the first dimension of tensors of one shape."""
    n = added.shape[0]
    if n < 2:
        return added
    pairs = n // 2
    first, second = decay[: 2 * pairs : 2], decay[1 : 2 * pairs : 2]
    start, stop = added[: 2 * pairs : 2], added[1 : 2 * pairs : 2]
    odd = linear_scan(first * second, second * start + stop)
    even = torch.cat([added[:1], decay[2::2] * odd[: (n - 1) // 2] + added[2::2]])
    joined = torch.stack([even[:pairs], odd], 1).flatten(0, 1)
    return joined if n % 2 == 0 else torch.cat([joined, even[pairs:]])


def selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    state: Tensor | None = None,
) -> ScanResult:
    """The recurrence above for all tokens at once; sums are taken in float32 or wider.

    Time and memory are O(N C S), so a large S is better served by steps; the networks that use it have S = 1.

    Args:
        u: (..., N, C), any leading dimensions.
        dt: (..., N, C), the steps, at least 0.
        a: (C, S) or with leading dimensions that broadcast, at most 0.
        b, c: (..., N, S).
        d: (C,) or with leading dimensions that broadcast; None for none.
        state: (..., C, S) from the tokens before; None for none.

    Raises:
        ShapeError: shapes do not fit together.
    """
    _check(u, dt, a, b, c, d, state)
    wide = torch.promote_types(u.dtype, torch.float32)
    x, dt, a, b, c = (t.to(wide) for t in (u, dt, a, b, c))
    decay = (dt.unsqueeze(-1) * a.unsqueeze(-3)).exp().movedim(-3, 0)
    added = ((dt * x).unsqueeze(-1) * b.unsqueeze(-2)).movedim(-3, 0)
    if u.shape[-2] == 0:
        return ScanResult(u, added.new_zeros(added.shape[1:]) if state is None else state.to(wide))
    if state is not None:
        added = torch.cat([added[:1] + decay[:1] * state.to(wide), added[1:]])
    h = linear_scan(decay, added)
    y = (h * c.movedim(-2, 0).unsqueeze(-2)).sum(-1).movedim(0, -2)
    if d is not None:
        y = y + d.to(wide).unsqueeze(-2) * x
    return ScanResult(y.to(u.dtype), h[-1])


def _check(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor | None) -> None:
    if u.dim() < 2:
        raise ShapeError(f"u: expected (..., N, C), got {tuple(u.shape)}")
    *lead, n, channels = u.shape
    if a.dim() < 2 or a.shape[-2] != channels or not _broadcasts(a.shape[:-2], lead):
        raise ShapeError(f"a: expected ({channels}, S) to go with u {tuple(u.shape)}, got {tuple(a.shape)}")
    size = a.shape[-1]
    expected = {"dt": (dt, (*lead, n, channels)), "b": (b, (*lead, n, size)), "c": (c, (*lead, n, size))}
    if state is not None:
        expected["state"] = (state, (*lead, channels, size))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if d is not None and (d.dim() < 1 or d.shape[-1] != channels or not _broadcasts(d.shape[:-1], lead)):
        raise ShapeError(f"d: expected ({channels},) to go with u {tuple(u.shape)}, got {tuple(d.shape)}")


def _broadcasts(shape: tuple[int, ...], lead: list[int]) -> bool:
    return len(shape) <= len(lead) and all(a in (1, b) for a, b in zip(shape[::-1], lead[::-1], strict=False))
