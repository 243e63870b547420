"""Rules that turn scores into choices. A score of -inf marks what may not be chosen; all rules return a bool table."""

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """The k highest of every row (all of them where there are fewer).

    Args:
        scores: (..., nq, nk).
        k: one number, or integers that broadcast to (..., nq).
    """
    budget = torch.as_tensor(k, device=scores.device)
    most = min(scores.shape[-1], max(0, int(budget.max())))
    values, index = scores.topk(most, dim=-1)
    keep = (torch.arange(most, device=scores.device) < budget.unsqueeze(-1)) & (values > -torch.inf)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, keep)


def top_p(scores: Tensor, p: float) -> Tensor:
    """The fewest of every row whose softmax probabilities sum to at least p."""
    values, index = scores.sort(dim=-1, descending=True)
    weights = values.softmax(-1)
    before = weights.cumsum(-1) - weights
    keep = (before < p) & (values > -torch.inf)
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def threshold(scores: Tensor, least: float) -> Tensor:
    """All whose score is at least `least`."""
    return (scores >= least) & (scores > -torch.inf)
