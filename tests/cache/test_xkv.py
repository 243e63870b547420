"""Cross-layer decomposition, MiniCache, and the probe for shared subspaces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regard.cache import GroupedLayer, SharedBasis, cross_layer_svd, group_layers, minicache_merge, subspace_overlap
from regard.errors import ArgumentError, ShapeError, Unsupported


def normal(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(basis: Tensor, factors: list[Tensor]) -> Tensor:
    return torch.cat([basis @ factor for factor in factors], dim=-1)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@given(st.lists(st.integers(0, 99), max_size=12, unique=True), st.integers(1, 5))
def test_groups_are_consecutive_and_complete(layers, size):
    groups = group_layers(layers, size)
    assert [layer for group in groups for layer in group] == layers
    assert all(len(group) == size for group in groups[:-1])
    assert all(1 <= len(group) <= size for group in groups)


@given(tokens=st.integers(1, 24), widths=st.lists(st.integers(1, 9), min_size=1, max_size=4), rank=st.integers(1, 30))
def test_equals_torchs_truncated_svd(tokens, widths, rank):
    """Batched, on either side of square, layers of different widths, any rank."""
    xs = [normal(2, tokens, width, seed=i) for i, width in enumerate(widths)]
    basis, factors = cross_layer_svd(xs, rank)
    r = min(rank, tokens, sum(widths))
    assert basis.shape == (2, tokens, r)
    assert [factor.shape for factor in factors] == [(2, r, width) for width in widths]
    u, s, v = torch.linalg.svd(torch.cat(xs, dim=-1).double(), full_matrices=False)
    expected = (u[..., :r] * s[..., None, :r]) @ v[:, :r]
    torch.testing.assert_close(product(basis, factors), expected.float(), atol=2e-5, rtol=1e-4)


def test_squaring_loses_no_digit_of_float32():
    """Singular values over eight decades, of which float32 resolves seven."""
    u, v = (torch.linalg.qr(normal(64, 40, seed=i).double()).Q for i in range(2))
    x = ((u * torch.logspace(0, -8, 40, dtype=torch.float64)) @ v.mT[:, :48]).float()[None]
    for rank in (10, 30):
        error = (product(*cross_layer_svd([x], rank)) - x).double().norm()
        s = torch.linalg.svdvals(x.double())
        assert error < s[0, rank:].norm() * 1.01 + 1e-7 * s.max()


def test_parts_hold_nothing_else():
    basis, factors = cross_layer_svd([normal(1, 50, 20), normal(1, 50, 20, seed=1)], 3)
    for x in (basis, *factors):
        assert x.untyped_storage().nbytes() == 4 * x.numel()


def test_a_shared_basis_is_found_exactly_where_layers_alone_fail():
    """Card, behaviour (a): all layers of a group share a token basis of dimension r."""
    r, layers, tokens, d = 8, 4, 120, 24
    common = normal(1, tokens, r)
    xs = [common @ normal(1, r, d, seed=1 + i) for i in range(layers)]
    x = torch.cat(xs, dim=-1)
    together = product(*cross_layer_svd(xs, r))
    alone = torch.cat([product(*cross_layer_svd([part], r // layers)) for part in xs], dim=-1)  # the same storage
    assert relative_error(together, x) < 1e-5
    assert relative_error(alone, x) > 0.1


def test_randomized_finds_a_low_rank():
    x = normal(2, 60, 5) @ normal(2, 5, 30, seed=1)
    basis, factors = cross_layer_svd([x[..., :10], x[..., 10:]], 5, randomized=True)
    assert basis.shape == (2, 60, 5)
    assert relative_error(product(basis, factors), x) < 1e-5


def test_half_precision_comes_back():
    basis, factors = cross_layer_svd([normal(1, 30, 8).bfloat16()], 4)
    assert {x.dtype for x in (basis, *factors)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("xs", "rank", "error", "message"),
    [
        ([], 2, ShapeError, "got \\[\\]"),
        ([torch.zeros(2, 3)], 2, ShapeError, r"got \[\(2, 3\)\]"),
        ([torch.zeros(1, 3, 2), torch.zeros(1, 4, 2)], 2, ShapeError, "equal B and N"),
        ([torch.zeros(1, 3, 2)], 0, ArgumentError, "rank must be at least 1, got 0"),
    ],
)
def test_refused(xs, rank, error, message):
    with pytest.raises(error, match=message):
        cross_layer_svd(xs, rank)


class TestMiniCache:
    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_merged_rows_share_a_direction_on_the_arc_and_keep_their_length(self, t):
        x1, x2 = normal(2, 3, 40, 8), 3 * normal(2, 3, 40, 8, seed=1)
        y1, y2 = minicache_merge(x1, x2, t, gamma=0.5)
        angle = torch.cosine_similarity(x1, x2, dim=-1).acos()
        merged = angle > angle.min() + 0.5 * (angle.max() - angle.min())
        assert 0 < merged.sum() < merged.numel()
        assert torch.equal(y1[~merged], x1[~merged])
        assert torch.equal(y2[~merged], x2[~merged])
        torch.testing.assert_close(y1.norm(dim=-1), x1.norm(dim=-1))
        torch.testing.assert_close(y2.norm(dim=-1), x2.norm(dim=-1))
        torch.testing.assert_close(torch.cosine_similarity(y1, y2, dim=-1)[merged], torch.ones(int(merged.sum())))
        for y, share in ((x1, t), (x2, 1 - t)):  # the direction lies a share t of the way from x1 to x2
            turned = torch.cosine_similarity(y1, y, dim=-1).clamp(-1, 1).acos()
            torch.testing.assert_close(turned[merged], share * angle[merged], atol=2e-3, rtol=1e-3)

    def test_the_default_merges_nothing(self):
        x1, x2 = normal(50, 8), normal(50, 8, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(minicache_merge(x1, x2), (x1, x2), strict=True))

    def test_parallel_and_empty_rows_stay_finite(self):
        x1 = normal(6, 8)
        x2 = normal(6, 8, seed=1)
        x2[0], x1[1], x2[1] = 2 * x1[0], 0, 0
        assert all(torch.isfinite(y).all() for y in minicache_merge(x1, x2, 0.5, gamma=-0.1))


def test_overlap_of_subspaces():
    u = torch.linalg.qr(normal(2, 60, 12)).Q
    mix = normal(2, 6, 6, seed=1)
    same = subspace_overlap(u[..., :6] @ mix, u[..., :6], 6)
    torch.testing.assert_close(same, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(subspace_overlap(u[..., :6], u[..., 6:], 6), torch.zeros(2, dtype=torch.float64))
    half = subspace_overlap(u[..., :6], u[..., 3:9], 6)
    torch.testing.assert_close(half, torch.full((2,), 0.5, dtype=torch.float64))


def test_grouped_layers_do_not_drop_tokens_one_by_one():
    with pytest.raises(Unsupported, match="cannot drop tokens"):
        GroupedLayer(SharedBasis(4, 4)).keep(torch.tensor([[[0]]]))
