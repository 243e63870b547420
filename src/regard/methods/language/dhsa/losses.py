"""Training targets and loss of the boundary predictors."""

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_label(ratio: Tensor, alpha: float = 4.0, beta: float = 0.0) -> Tensor:
    """``sigmoid(alpha · (ln(ratio + 1e-6) - beta))``: how surely a mass ratio marks a boundary."""
    return torch.sigmoid(alpha * (torch.log(ratio + 1e-6) - beta))


def focal_bce(
    logits: Tensor, target: Tensor, mask: Tensor, gamma: float = 2.0, pos_weight: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy weighted by ``(1 - p_t)^gamma``, averaged over the positions in `mask`.

    ``p_t = p·target + (1 - p)(1 - target)`` with p = sigmoid(logits); targets may be soft.
    """
    bce = F.binary_cross_entropy_with_logits(logits, target, pos_weight=pos_weight, reduction="none")
    p = torch.sigmoid(logits)
    p_t = p * target + (1 - p) * (1 - target)
    mask = mask.to(bce.dtype)
    return ((1 - p_t) ** gamma * bce * mask).sum() / mask.sum().clamp(min=1)
