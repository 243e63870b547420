"""How a mixture of experts routes: how surely, and how much that changes while it trains."""

import torch
from torch import Tensor

from regard.errors import ShapeError


def routing_entropy(probs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean entropy in nats of the distributions over experts (..., E); of real tokens only, with ``valid`` (...)."""
    entropy = torch.special.entr(probs).sum(-1)
    return entropy.mean() if valid is None else entropy[valid].mean()


def routing_fluctuation(prev_indices: Tensor, new_indices: Tensor, valid: Tensor | None = None) -> Tensor:
    """The share of tokens whose set of experts changed between two checkpoints (arXiv:2505.00792).

    Args:
        prev_indices, new_indices: (..., k) experts chosen for the same tokens, in any order.
        valid: (...) bool, False marks padding, which does not count.

    Raises:
        ShapeError: these are not the same tokens.
    """
    if prev_indices.shape != new_indices.shape:
        raise ShapeError(f"new_indices: expected {tuple(prev_indices.shape)}, got {tuple(new_indices.shape)}")
    changed = (prev_indices.sort(-1).values != new_indices.sort(-1).values).any(-1)
    return (changed if valid is None else changed[valid]).float().mean()
