"""Attention on grids by NATTEN's kernels, where that package is installed."""

from collections.abc import Sequence

from torch import Tensor

from regard.attention.grid_plan import Axis
from regard.attention.partial import Partial
from regard.errors import require


def natten_attention(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Axis], *, scale: float | None = None
) -> Partial:
    """What `grid_attention` computes without a bias, for windows that stop at the borders; NATTEN 0.21 or later.

    Args:
        query: (B, *lengths, H, D).
        key, value: (B, *lengths, Hk, D), where Hk divides H; NATTEN wants values as wide as keys.
        axes: one to three.
        scale: 1/√D by default.

    Returns:
        A `Partial` with out (B, *lengths, H, D) and lse (B, *lengths, H).
    """
    natten = require("natten", "run its kernels")
    groups = query.shape[-2] // key.shape[-2]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, -2) for t in (key, value))
    function = getattr(natten, f"na{len(axes)}d")
    out, lse = function(
        query,
        key,
        value,
        kernel_size=tuple(axis.window for axis in axes),
        stride=tuple(axis.stride for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        is_causal=tuple(axis.causal for axis in axes),
        scale=scale,
        return_lse=True,
    )
    return Partial(out, lse)
