"""`Partial`, the result of attending to some of the keys, and `merge`, which joins such results exactly."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


class Partial(NamedTuple):
    """Softmax attention over a set S of keys: ``out_i = Σ_{j∈S} exp(s_ij - lse_i) v_j``.

    Attributes:
        out: (B, H, N, Dv); zeros where a query sees no key of S.
        lse: (B, H, N), ``log Σ_{j∈S} exp s_ij`` in float32 or wider; ``-inf`` where a query sees no key of S.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(
        cls, *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "Partial":
        """The identity of `merge`: attention over no keys at all, for an output of shape (B, H, N, Dv)."""
        out = torch.zeros(shape, dtype=dtype, device=device)
        lse_dtype = torch.promote_types(out.dtype, torch.float32)
        return cls(out, torch.full(shape[:-1], -torch.inf, dtype=lse_dtype, device=device))


def merge(*partials: Partial) -> Partial:
    """Attention over the union of disjoint key sets, from the attention over each of them.

        lse = log Σ_p exp lse_p        out = Σ_p exp(lse_p - lse) out_p

    Associative, with `Partial.empty` as identity, and differentiable in every ``out_p`` and ``lse_p``; rows that no
    part sees stay zeros with ``lse = -inf`` and have zero gradients.

    Raises:
        ArgumentError: called without partials.
        ShapeError: the partials are not over the same queries, or an ``lse`` does not match its ``out``.
    """
    if not partials:
        raise ArgumentError("merge: expected at least one Partial, got none")
    for i, (out, lse) in enumerate(partials):
        if out.shape != partials[0].out.shape or lse.shape != out.shape[:-1]:
            raise ShapeError(
                f"merge: partial {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; expected out "
                f"{tuple(partials[0].out.shape)} and lse {tuple(partials[0].out.shape[:-1])}"
            )
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([p.lse for p in partials])
    peak = lses.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = (lses - peak).exp()
    total = weights.sum(0)
    unseen = total == 0
    total = total.masked_fill(unseen, 1.0)
    lse = (total.log() + peak).masked_fill(unseen, -torch.inf)
    # one part at a time: stacking the outs would double the memory of the largest tensors here
    out = sum((w / total).unsqueeze(-1) * p.out for w, p in zip(weights, partials, strict=True))
    assert isinstance(out, Tensor)
    return Partial(out.to(partials[0].out.dtype), lse)
