"""Scores and choices of H2O."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.cache import HeavyHitterLayer, HeavyHitterMask, accumulate, heavy_hitters
from regard.sites import Step


def weights(*shape, seed=0):
    """Random attention weights (B, H, N, K) of the last N of K tokens, causal."""
    n, k = shape[-2:]
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(n, k, dtype=torch.bool).triu(k - n + 1), -torch.inf).softmax(-1)


def test_scores_add_up_to_the_column_sums_of_the_whole_map():
    whole = weights(2, 3, 9, 9)
    scores = None
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        scores = accumulate(scores, whole[:, :, start:stop, :stop].sum(2))
    torch.testing.assert_close(scores, whole.sum(2))


@given(
    scores=st.lists(st.integers(0, 1000), min_size=1, max_size=20, unique=True),
    hh_size=st.integers(0, 8),
    recent_size=st.integers(0, 8),
)
def test_heavy_hitters(scores, hh_size, recent_size):
    kept = heavy_hitters(torch.tensor(scores, dtype=torch.float32), hh_size, recent_size).tolist()
    recent = max(len(scores) - recent_size, 0)
    best = sorted(range(recent), key=lambda j: -scores[j])[:hh_size]
    assert kept == sorted(best) + list(range(recent, len(scores)))


@pytest.mark.parametrize("normalise", [False, True])
def test_the_layer_judges_in_total_or_per_query(normalise):
    """Uniform attention: in total the oldest win, per query all early positions share 1/1, 1/2, … unequally."""
    layer = HeavyHitterLayer(hh_size=2, recent_size=2, normalise=normalise)
    layer.begin(Step(torch.arange(6)[None]))
    layer.update(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2))
    received = torch.tensor([[[3.0, 2.5, 2.4, 2.3, 1.0, 1.0]]])  # seen by 6, 5, 4, 3, 2, 1 queries
    layer.observe(received, 6)
    layer.evict()
    # per query: 0.5, 0.5, 0.6, 0.77
    assert layer.slots.positions[0, 0].tolist() == ([2, 3, 4, 5] if normalise else [0, 1, 4, 5])
    torch.testing.assert_close(layer.scores, received[..., layer.slots.positions[0, 0].long()])
    if normalise:
        assert layer.observations[0, 0].tolist() == [4, 3, 2, 1]


def test_padding_goes_first():
    layer = HeavyHitterLayer(hh_size=2, recent_size=2)
    valid = torch.tensor([[False, False, False, True, True, True]])
    layer.begin(Step(torch.arange(6)[None], valid=valid))
    layer.update(torch.zeros(1, 2, 6, 2), torch.zeros(1, 2, 6, 2))
    layer.observe(valid.logical_not().float().expand(1, 2, -1), 6)  # whatever it received
    layer.evict()
    assert layer.slots.valid.sum(-1).tolist() == [[3, 3]]


def simulate(policy, maps):
    """Drive the mask over one causal map per head, a prompt and single steps; the masks it sets."""
    masks = []
    for row in maps:
        policy.update(policy.apply(row.log().clamp_min(-1e9)).softmax(-1))
        masks.append(policy.mask.clone())
    return masks


def test_the_mask_hides_what_the_budget_cannot_hold():
    """Batch and heads decide for themselves; each step shows heavy, the coming token and recent - 1 others."""
    whole = weights(2, 3, 14, 14)
    maps = [whole[:, :, :8, :8], *(whole[:, :, t : t + 1, : t + 1] for t in range(8, 14))]
    policy = HeavyHitterMask(heavy_ratio=0.25, recent_ratio=0.375)
    masks = simulate(policy, maps)
    assert policy.budgets == (2, 3)
    for length, mask in zip(range(8, 15), masks, strict=True):
        assert mask.shape == (2, 3, 1, length + 1)
        assert (mask.sum(-1) == 5).all()
        assert (mask[..., -3:] == 1).all()
        assert (mask[..., length - 3] == 0).all()  # in neither set: the published off-by-one
    alone = simulate(HeavyHitterMask(0.25, 0.375), [row[1:, 2:] for row in maps])
    assert all(torch.equal(a, b[1:, 2:]) for a, b in zip(alone, masks, strict=True))


def test_a_budget_for_everything_masks_nothing():
    whole = weights(1, 2, 6, 6)
    for mask in simulate(HeavyHitterMask(0.5, 0.5), [whole]):
        assert (mask == 1).all()


def test_what_is_hidden_stays_hidden_and_forgets_its_score():
    whole = weights(1, 2, 12, 12)
    maps = [whole[:, :, :6, :6], *(whole[:, :, t : t + 1, : t + 1] for t in range(6, 12))]
    policy = HeavyHitterMask(heavy_ratio=0.34, recent_ratio=0.34)
    hidden = torch.zeros(1, 2, 0, dtype=torch.bool)
    for row in maps:
        policy.update(policy.apply(row.log().clamp_min(-1e9)).softmax(-1))
        length = row.shape[-1]
        now = policy.mask[:, :, 0, :length] == 0
        assert (now[..., : hidden.shape[-1]] | ~hidden).all()
        assert (policy.scores[now & (torch.arange(length) < length - 2)] == 0).all()
        hidden = now


def test_without_recent_tokens_scores_stay_where_the_mask_is():
    policy = HeavyHitterMask(heavy_ratio=0.5, recent_ratio=0.0)
    policy.update(weights(1, 1, 6, 6))
    kept = policy.mask[0, 0, 0, :6] == 1
    assert kept.sum() == 3
    assert torch.equal(policy.scores[0, 0] > 0, kept)
