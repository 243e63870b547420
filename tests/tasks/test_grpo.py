"""GRPO: the clipped objective in loops, and its gradient."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.tasks import group_advantages, grpo_loss


def inputs(seed=0, shape=(4, 7)):
    generator = torch.Generator().manual_seed(seed)
    logp, old, gamma = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    adv = torch.randn(shape[0], dtype=torch.float64, generator=generator)
    return 0.3 * logp - 1, 0.3 * old - 1, adv, 1 + gamma.abs(), torch.rand(shape, generator=generator) < 0.7


def test_is_the_formula() -> None:
    logp, old, adv, gamma, mask = inputs()
    total, count = 0.0, 0
    for i in range(4):
        for t in range(7):
            if mask[i, t]:
                ratio = (logp[i, t] - old[i, t]).exp().item()
                a = (gamma[i, t] * adv[i]).item()
                total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                count += 1
    assert grpo_loss(logp, old, adv, gamma, mask).item() == pytest.approx(-total / count, abs=1e-12)
    each = adv[:, None].expand(4, 7)
    torch.testing.assert_close(grpo_loss(logp, old, each, gamma, mask), grpo_loss(logp, old, adv, gamma, mask))
    ones = torch.ones_like(gamma)
    torch.testing.assert_close(grpo_loss(logp, old, adv, None, mask), grpo_loss(logp, old, adv, ones, mask))


def test_credit_scales_the_gradient_of_its_token_and_has_none() -> None:
    logp, _, adv, gamma, mask = inputs(1)
    logp, gamma = logp.requires_grad_(), gamma.requires_grad_()
    grpo_loss(logp, logp.detach(), adv, gamma, mask).backward()  # on policy: ratio 1, nothing clipped
    torch.testing.assert_close(logp.grad, -(gamma.detach() * adv[:, None] * mask) / mask.sum())
    assert gamma.grad is None


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[1.0, -1.0, -1.0, 1.0], [0.0] * 4]


def test_refusals() -> None:
    logp, old, adv, gamma, mask = inputs()
    with pytest.raises(ShapeError, match="expected logp, logp_old, gamma and mask"):
        grpo_loss(logp, old, adv[1:], gamma, mask)
    with pytest.raises(ArgumentError, match="mask: expected some tokens"):
        grpo_loss(logp, old, adv, gamma, mask & False)
