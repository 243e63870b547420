"""Scores against torch's own and by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from regard.tasks import agreement, negative_log_likelihood, perplexity
from regard.tasks.metrics import hit_rate, ndcg, ranks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_negative_log_likelihood_is_cross_entropy(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator).to(dtype)
    targets = torch.randint(11, (3, 5), generator=generator)
    losses = negative_log_likelihood(logits, targets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.dtype == wide
    torch.testing.assert_close(
        losses, F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    )


def test_perplexity():
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert perplexity([1e6]) == math.inf


def test_agreement():
    assert agreement([1, 2, 3, 4], [1, 0, 3, 4]) == 0.75
    with pytest.raises(ValueError, match="longer"):
        agreement([1], [1, 2])


def test_scores_of_recommendations():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    targets = torch.tensor([1, 2, 0])
    assert ranks(scores, targets).tolist() == [0, 1, 2]
    assert hit_rate(scores, targets, 2) == pytest.approx(2 / 3)
    assert ndcg(scores, targets, 2) == pytest.approx((1 + math.log(2) / math.log(3)) / 3)
    assert ndcg(scores, targets, 1) == pytest.approx(1 / 3)
