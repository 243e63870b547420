"""Scores of next-token predictions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target: (..., vocabulary) logits and (...) token ids give (...), in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean negative log likelihood; infinite where that overflows."""
    mean = math.fsum(losses) / len(losses)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def agreement(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """The share of positions at which two equally long token sequences are the same."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)
