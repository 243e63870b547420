"""`attention`, the choice of its backend, and `explain`, which says what was chosen and why."""

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from regard.attention import blocks, flex, reference, sdpa
from regard.attention.intercept import STACK
from regard.attention.partial import Partial
from regard.attention.problem import Problem, bias_as_channels, checked
from regard.errors import ArgumentError, Unsupported
from regard.masks import Mask

BACKENDS = ("auto", "reference", "sdpa", "flex", "blocks")


@dataclass(frozen=True)
class Explanation:
    """What `attention` does for given arguments.

    Attributes:
        backend: the backend that runs.
        reason: why this one.
        density: the share of query-key pairs that is computed.
        block_size: (queries, keys) of the blocks in which the mask was read; None where it was not.
    """

    backend: str
    reason: str
    density: float = 1.0
    block_size: tuple[int, int] | None = None

    def __str__(self) -> str:
        size = "" if self.block_size is None else " in blocks of {} x {}".format(*self.block_size)
        return f"{self.backend}: {self.reason}; computes {self.density:.1%} of the pairs{size}"


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
    if STACK and (attend := STACK[-1]) is not None:
        if return_lse:
            raise Unsupported("inside regard.apply: a mechanism that composes several attentions has no single one")
        return attend(query, key, value, p.mask, bias, p.scale)
    if backend == "auto":
        p = bias_as_channels(p)
        backend = _choose(p, return_lse).backend
    match backend:
        case "sdpa" if p.n and p.m:
            result = sdpa.run(p, return_lse)
        case "flex" if p.n and p.m:
            result = flex.run(p, return_lse)
        case "blocks" if p.n and p.m:
            result = blocks.run(p)
        case _:
            result = reference.run(p)
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
    return _choose(bias_as_channels(checked(query, key, value, mask, bias, scale)), return_lse)


def _choose(p: Problem, return_lse: bool) -> Explanation:
    if p.query.numel() == 0 or p.m == 0:
        return Explanation("reference", "there is nothing to compute", 0.0)
    no_sdpa = sdpa.refuses(p, return_lse)
    learnt_bias = p.needs_grad and p.bias is not None and p.bias.requires_grad
    offset = sdpa.causal_offset(p)
    if p.bias is None and offset is not None and no_sdpa is None:
        if offset >= p.m - 1:
            return Explanation("sdpa", "every query sees every key")
        # i + offset + 1 keys for query i, as far as there are so many
        rising = min(p.n, p.m - offset)
        visible = rising * (2 * offset + rising + 1) // 2 + (p.n - rising) * p.m
        return Explanation("sdpa", "causal, for which the fused kernel has its own path", visible / (p.n * p.m))
    if p.device.type != "cpu":
        return _choose_accelerator(p, return_lse, no_sdpa)
    if learnt_bias and p.n * p.m > _SMALL:
        work = blocks.prepare(p)[0]
        return Explanation("blocks", "a bias that needs a gradient, tile by tile", work.density, work.side)
    if p.n * p.m <= _SMALL or not isinstance(p.mask, Mask):
        if no_sdpa is None:
            return Explanation("sdpa", "small enough" if p.n * p.m <= _SMALL else "no block structure is known")
        return Explanation("blocks", no_sdpa)
    work = blocks.prepare(p)[0]
    return Explanation("blocks", "tile by tile, only where the mask allows anything", work.density, work.side)


def _choose_accelerator(p: Problem, return_lse: bool, no_sdpa: str | None) -> Explanation:
    """Away from the CPU the compiled kernel is the fast one; tiles in matrix products do what it cannot."""
    if isinstance(p.mask, Mask) and p.bias is None and flex.refuses(p, return_lse) is None:
        return Explanation("flex", "a compiled kernel for the mask")
    if no_sdpa is None:
        return Explanation("sdpa", "a dense mask or bias is given")
    return Explanation("blocks", no_sdpa)


_SMALL = 1 << 16  # score entries per head below which planning costs more than a dense mask
