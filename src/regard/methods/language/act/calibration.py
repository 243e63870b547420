"""ACT (arXiv:2406.15765): hand most of the weight of attention sinks inside the text back to the other tokens.

Of one head's causal weights A (N, N), with c_j the mean weight that key j gets from the queries that can see it,

    c_j   = Σ_i A_ij / (N - j)
    S     = {j : c_j > threshold},  S' = S without its first element: the usual sink at the start is kept
    p_i   = Σ_{j∈S'} A_ij
    A'_ij = β A_ij                                     for j in S'
    A'_ij = A_ij + (1 - β) p_i · A_ij / (1 - p_i)      for the other j

so rows still sum to 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError

#: a mean weight, or "5/N": five times what each of N keys gets when attention is uniform
Threshold = float | str


def column_average(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean weight of each key over the queries at or after it, ``c_j = Σ_i A_ij / (N - j)``: (B, H, M).

    Args:
        weights: causal attention weights (B, H, N, M) of the last N of M positions; rows sum to 1.
        valid: (B, M) bool, False for padding, whose queries do not count.

    Raises:
        ShapeError: weights or valid have other shapes.
    """
    _check_weights(weights, valid)
    n, m = weights.shape[-2:]
    real = torch.ones(1, m, dtype=torch.bool, device=weights.device) if valid is None else valid
    queries = real.clone()
    queries[:, : m - n] = False
    sums = (weights * queries[:, None, m - n :, None]).sum(2)
    return sums / at_or_after(queries)[:, None].clamp_min(1)


def find_sinks(weights: Tensor, threshold: Threshold = 0.1, valid: Tensor | None = None) -> Tensor:
    """The attention sinks of each head, ``c_j > threshold``, the first one included: (B, H, M) bool.

    The last keys are seen by few queries, so late tokens that attend to themselves count too, as in the published code.
    `regard.probes.recorded_sinks` finds them from a recording, at any length.

    Args:
        weights, valid: as in `column_average`.
        threshold: a mean weight, or ``"5/N"`` for five times the uniform weight over the N real tokens.

    Raises:
        ShapeError: weights or valid have other shapes.
        ArgumentError: the threshold is neither.
    """
    check_threshold(threshold)
    average = column_average(weights, valid)
    lengths = torch.tensor([weights.shape[-1]], device=weights.device) if valid is None else valid.sum(-1)
    return above(average, threshold, lengths)


def calibrate_attention(
    weights: Tensor,
    heads: Sequence[int],
    beta: float = 0.4,
    threshold: Threshold = 0.1,
    protect_first: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Weights (B, H, N, M) in which some heads' sinks keep only the share β of theirs; see the module's equations.

    A row whose whole weight lies on sinks has nobody to hand it to and stays as it is.

    Args:
        weights, valid: as in `column_average`.
        heads: indices of the heads to calibrate.
        beta: share of their weight that the sinks keep; 1 changes nothing.
        threshold: as in `find_sinks`.
        protect_first: leave each head's first sink alone.

    Raises:
        ShapeError: weights or valid have other shapes.
        ArgumentError: a head that is not there, or beta or threshold out of range.
    """
    check_beta(beta)
    _check_weights(weights, valid)
    check_heads(heads, weights.shape[1], "heads")
    chosen = weights[:, list(heads)]
    sinks = find_sinks(chosen, threshold, valid)
    if protect_first:
        sinks = without_first(sinks)
    on = chosen * sinks[:, :, None]
    rest = chosen - on
    freed = (1 - beta) * on.sum(-1, keepdim=True)
    left = rest.sum(-1, keepdim=True)
    calibrated = torch.where(left > 0, beta * on + rest + freed * rest / left.clamp_min(1e-38), chosen)
    return weights.index_copy(1, torch.tensor(list(heads), dtype=torch.long, device=weights.device), calibrated)


def above(average: Tensor, threshold: Threshold, lengths: Tensor) -> Tensor:
    """Which column averages (B, H, M) of texts of `lengths` (B or 1,) tokens exceed the threshold."""
    if isinstance(threshold, str):
        return average > float(threshold.removesuffix("/N")) / lengths.clamp_min(1)[:, None, None]
    return average > threshold


def without_first(sinks: Tensor) -> Tensor:
    """The sinks (B, H, M) but the first of each head."""
    return sinks & (sinks.cumsum(-1) > 1)


def check_threshold(threshold: Threshold) -> None:
    """Refuse what is neither a mean weight nor of the form ``"5/N"``."""
    number = threshold
    if isinstance(threshold, str):
        try:
            number = float(threshold.removesuffix("/N")) if threshold.endswith("/N") else -1.0
        except ValueError:
            number = -1.0
    if isinstance(number, str) or not number >= 0:
        raise ArgumentError(f"threshold: expected a mean weight of at least 0, or such as '5/N', got {threshold!r}")


def check_beta(beta: float) -> None:
    """Refuse a share that is none."""
    if not 0 <= beta <= 1:
        raise ArgumentError(f"beta must be between 0 and 1, got {beta}")


def at_or_after(queries: Tensor) -> Tensor:
    """How many of the queries (B, M) stand at or after each position: N - j where all count."""
    return queries.flip(-1).cumsum(-1).flip(-1)


def _check_weights(weights: Tensor, valid: Tensor | None) -> None:
    if weights.dim() != 4 or not weights.shape[2] <= weights.shape[3]:
        raise ShapeError(f"weights: expected (B, H, N, M) with N at most M, got {tuple(weights.shape)}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (weights.shape[0], weights.shape[3])):
        raise ShapeError(
            f"valid: expected bool {(weights.shape[0], weights.shape[3])}, got {valid.dtype} {tuple(valid.shape)}"
        )


def check_heads(heads: Sequence[int], count: int, name: str) -> None:
    if len(set(heads)) != len(heads) or not all(0 <= head < count for head in heads):
        raise ArgumentError(f"{name}: expected different ones of 0..{count - 1}, got {list(heads)}")
