"""`attention`, the choice of its backend, and `explain`, which says what was chosen and why."""

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from regard.attention import reference, sdpa
from regard.attention.partial import Partial
from regard.attention.problem import Problem, checked
from regard.errors import ArgumentError
from regard.masks import Mask

BACKENDS = ("auto", "reference", "sdpa", "flex", "blocks")


@dataclass(frozen=True)
class Explanation:
    """What `attention` does for given arguments.

    Attributes:
        backend: the backend that runs.
        reason: why this one.
        density: the share of query-key pairs its tiles compute; 1.0 where all of them are.
        block_size: side of the blocks the mask's structure was read in; None where it was not read.
    """

    backend: str
    reason: str
    density: float = 1.0
    block_size: int | None = None

    def __str__(self) -> str:
        blocks = "" if self.block_size is None else f", blocks of {self.block_size}"
        return f"{self.backend}: {self.reason} ({self.density:.1%} of the pairs computed{blocks})"


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> Partial: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | Partial:
    """Exact softmax attention under a mask: ``softmax(scale · q kᵀ + bias | mask) v``.

    A query that may see no key gets zeros, ``lse = -inf`` and zero gradients, in every backend.

    Args:
        query: (B, H, N, D).
        key: (B, Hk, M, D), where Hk divides H; query head h reads key head ``h // (H / Hk)``.
        value: (B, Hk, M, Dv).
        mask: a `regard.masks.Mask`, a bool tensor broadcastable to (B, H, N, M) (True = may be seen), or None.
        bias: added to the scaled scores, broadcastable to (B, H, N, M); differentiable.
        scale: ``1/sqrt(D)`` by default.
        backend: "auto", or one of "reference", "sdpa", "flex", "blocks". All give the same result.
        return_lse: return a `Partial` with the log-sum-exp of the scores (B, H, N), differentiable too.

    Returns:
        (B, H, N, Dv), or `Partial`.

    Raises:
        ShapeError: ranks, sizes or head counts do not fit together.
        ArgumentError: a dtype, device or argument makes no sense.
        Unsupported: the backend asked for by name cannot do this; "auto" always finds one that can.
    """
    p = checked(query, key, value, mask, bias, scale)
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = _choose(p, return_lse).backend
    result = sdpa.run(p, return_lse) if backend == "sdpa" and p.n and p.m else reference.run(p)
    return result if return_lse else result.out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Explanation:
    """What ``attention(..., backend="auto")`` would do for these arguments, and why; computes nothing."""
    return _choose(checked(query, key, value, mask, bias, scale), return_lse)


def _choose(p: Problem, return_lse: bool) -> Explanation:
    if sdpa.refuses(p, return_lse) is None:
        return Explanation("sdpa", "torch's fused kernel")
    return Explanation("reference", "no faster backend can do this")
