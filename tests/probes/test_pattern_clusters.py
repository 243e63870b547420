"""Autoencoder and clusters of attention maps on families that are known."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from regard.errors import ArgumentError, ShapeError
from regard.probes.pattern_clusters import AttentionPatternAutoencoder, pattern_summary
from regard.probes.vit_heads import hop_rings


def families(grid, each, seed=0):
    """Noisy maps of 1 + grid² tokens: own row, own column, own place, neighbours, all alike; and which is which."""
    g = torch.Generator().manual_seed(seed)
    place = torch.arange(grid * grid)
    rows, columns = place // grid, place % grid
    rings = hop_rings(grid, grid)
    patterns = (
        rows[:, None] == rows,
        columns[:, None] == columns,
        rings[0],
        rings[0] | rings[1],
        torch.ones(grid * grid, grid * grid, dtype=torch.bool),
    )
    n = 1 + grid * grid
    maps = []
    for pattern in patterns:
        allowed = torch.zeros(n, n)
        allowed[0], allowed[1:, 1:] = 1, pattern.float()
        noise = 0.5 * torch.randn(each, n, n, generator=g)
        maps.append(((allowed + 1e-3).log() + noise).softmax(-1))
    return torch.cat(maps), torch.arange(5).repeat_interleave(each)


def test_codes_tell_the_families_apart():
    maps, kinds = families(7, 40)
    coder = AttentionPatternAutoencoder(50)
    seen = []
    errors = coder.fit(maps, epochs=15, batch_size=32, on_progress=lambda *step: seen.append(step))
    assert len(errors) == 15
    assert errors[-1] < errors[0] / 4
    assert seen[0] == (0, 15)
    codes = coder.encode(maps)
    assert codes.shape == (200, 2)
    assert not codes.requires_grad
    found = pattern_summary(codes, 5, maps=maps, heads=kinds)
    assert adjusted_rand_score(kinds, found.labels) > 0.9
    assert found.histogram.shape == (5, 5)
    assert found.entropy.max() < 0.35
    for cluster in range(5):
        torch.testing.assert_close(found.mean_maps[cluster], maps[found.labels == cluster].mean(0))
    other = families(7, 8, seed=1)
    assert adjusted_rand_score(other[1], pattern_summary(coder.encode(other[0]), 5).labels) > 0.9


def test_the_same_seed_gives_the_same_codes():
    maps = families(3, 8)[0]
    state = torch.random.get_rng_state()
    codes = []
    for seed in (1, 1, 2):
        coder = AttentionPatternAutoencoder(10, 3, seed=seed)
        coder.fit(maps, epochs=2)
        codes.append(coder.encode(maps))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    torch.testing.assert_close(coder.encode(maps, batch_size=3), codes[2])


def test_sizes():
    for size, side in ((5, 8), (50, 56), (64, 64), (65, 72), (257, 88)):
        coder = AttentionPatternAutoencoder(size).eval()
        assert coder(torch.rand(2, size, size)).shape == (2, side, side)
    prepared = AttentionPatternAutoencoder(5).prepare(0.2 * torch.ones(1, 5, 5))
    assert prepared[0, :5, :5].eq(1).all()
    assert prepared.sum() == 25
    pooled = AttentionPatternAutoencoder(127).prepare(torch.eye(127)[None])[0]
    expected = torch.eye(64) / 2  # the last square has one entry instead of four
    expected[-1, -1] = 1
    torch.testing.assert_close(pooled, expected)


def test_clusters_of_points():
    """Three groups of 30, 20 and 10; heads 0 and 1 stay in one each, head 2 is in two of them."""
    g = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0.0]] * 10 + [[5.0, 0.0]] * 30 + [[0.0, 5.0]] * 20)
    codes = places + 0.1 * torch.randn(60, 2, generator=g)
    heads = torch.tensor([2] * 10 + [0] * 30 + [1] * 10 + [2] * 10)
    found = pattern_summary(codes, heads=heads)
    assert found.k == 3
    assert set(found.silhouettes) == set(range(2, 9))
    assert found.silhouettes[3] == max(found.silhouettes.values()) > 0.9
    assert found.labels.tolist() == [2] * 10 + [0] * 30 + [1] * 20
    torch.testing.assert_close(found.centres, torch.tensor([[5.0, 0], [0, 5], [0, 0]]).double(), atol=0.1, rtol=0)
    assert found.histogram.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]
    torch.testing.assert_close(
        found.entropy, torch.tensor([0, 0, 2]).double().clamp(max=1) * torch.log(torch.tensor(2.0))
    )
    assert pattern_summary(codes, 2).mean_maps is None


def test_refusals():
    with pytest.raises(ArgumentError, match="size, code_dim and width must be at least 1"):
        AttentionPatternAutoencoder(10, 0)
    coder = AttentionPatternAutoencoder(10)
    with pytest.raises(ShapeError, match=r"maps: expected \(B, 10, 10\), got \(2, 9, 9\)"):
        coder.encode(torch.zeros(2, 9, 9))
    with pytest.raises(ArgumentError, match="epochs must be at least 1"):
        coder.fit(torch.zeros(1, 10, 10))
    codes = torch.randn(10, 2)
    with pytest.raises(ArgumentError, match="k: expected 2 to 9 clusters of 10 codes, got"):
        pattern_summary(codes, 10)
    with pytest.raises(ShapeError, match="heads: expected one for each of 10 codes, got 3"):
        pattern_summary(codes, 2, heads=torch.zeros(3))
    with pytest.raises(ShapeError, match=r"codes: expected \(B, D\)"):
        pattern_summary(codes[0])
