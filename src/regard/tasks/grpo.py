"""Group-relative policy optimisation (arXiv:2402.03300) with credit per token."""

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


def group_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / std over the last dimension, the answers to one prompt; 0 where all are rewarded alike."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    deviation = rewards.std(-1, keepdim=True, correction=0)
    return torch.where(deviation > 0, centred / deviation.clamp(min=torch.finfo(rewards.dtype).tiny), 0.0)


def grpo_loss(
    logp: Tensor, logp_old: Tensor, adv: Tensor, gamma: Tensor | None, mask: Tensor, eps: float = 0.2
) -> Tensor:
    """The clipped objective, negated: -mean over tokens of min(ρ γ A, clip(ρ, 1 - ε, 1 + ε) γ A).

    There is no KL and no entropy term, and γ carries no gradient.

    Args:
        logp, logp_old: (B, N) log probabilities of the tokens under the policy and the one that drew them.
        adv: (B,) or (B, N).
        gamma: (B, N) credit, such as `regard.probes.rhythm_credit`; None for 1.
        mask: (B, N) bool, tokens that count.

    Raises:
        ShapeError: shapes that do not fit.
        ArgumentError: no token counts.
    """
    gamma = torch.ones_like(logp) if gamma is None else gamma
    if not (logp.shape == logp_old.shape == gamma.shape == mask.shape) or adv.shape not in (logp.shape, logp.shape[:1]):
        raise ShapeError(
            f"expected logp, logp_old, gamma and mask (B, N) and adv (B,) or (B, N), got {tuple(logp.shape)}, "
            f"{tuple(logp_old.shape)}, {tuple(gamma.shape)}, {tuple(mask.shape)} and {tuple(adv.shape)}"
        )
    if not bool(mask.any()):
        raise ArgumentError("mask: expected some tokens, got none")
    ratio = (logp - logp_old.detach()).exp()
    credit = gamma.detach() * (adv if adv.dim() == 2 else adv[:, None])
    gain = torch.minimum(ratio * credit, ratio.clamp(1 - eps, 1 + eps) * credit)
    return -(gain * mask).sum() / mask.sum()
