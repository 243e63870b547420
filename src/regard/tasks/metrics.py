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


def hit_rate(scores: Tensor, targets: Tensor, k: int) -> float:
    """HR@k: the share of users whose item is among the k best: (B, items) scores and (B,) item ids."""
    return (ranks(scores, targets) < k).double().mean().item()


def ndcg(scores: Tensor, targets: Tensor, k: int) -> float:
    """NDCG@k with one relevant item: mean of ``1 / log2(rank + 2)``, rank from 0, and 0 from rank k on."""
    rank = ranks(scores, targets)
    return torch.where(rank < k, 1 / torch.log2(rank.double() + 2), 0.0).mean().item()


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """How many items score better than each target (B,); one that ties does not."""
    return (scores > scores.gather(-1, targets[..., None].long())).sum(-1)
