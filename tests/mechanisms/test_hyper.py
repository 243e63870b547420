"""HyperAttention: where it must be exact, what it estimates, and that causal stretches stay apart."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.sparse.hyper import HyperAttention, HyperSelfAttention


def qkv(n: int, seed: int = 0, heads: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, n, 8, dtype=torch.float64, generator=generator) for _ in range(3))


def dense(q, k, v, causal: bool = False):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_short_sequences_are_exact(causal: bool) -> None:
    q, k, v = qkv(20)
    got = HyperAttention(8, min_seq_len=21)(q, k, v, causal=causal)
    torch.testing.assert_close(got.out, dense(q, k, v, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_one_block_that_holds_all_keys_is_exact(causal: bool) -> None:
    q, k, v = qkv(33)
    attend = HyperAttention(8, block_size=64, min_seq_len=8)
    torch.testing.assert_close(attend(q, k, v, causal=causal).out, dense(q, k, v, causal))


def test_padding_of_the_last_block_takes_part_only_as_published() -> None:
    q, k, v = qkv(33)
    published = HyperAttention(8, block_size=64, min_seq_len=8, mask_padding=False)
    assert not torch.allclose(published(q, k, v).out, dense(q, k, v), atol=1e-3)


def test_sampling_every_other_key_once_is_exact() -> None:
    """All keys as samples, of which a query's own block is left out: together each key counts once."""
    q, k, v = qkv(32)
    attend = HyperAttention(8, block_size=8, sample_size=32, min_seq_len=8)
    everything = torch.arange(32).expand(1, 2, 32)
    got = attend(q, k, v, samples=[everything])
    torch.testing.assert_close(got.out, dense(q, k, v))
    torch.testing.assert_close(got.lse, (q @ k.mT * 8**-0.5).logsumexp(-1))


def test_more_samples_come_closer() -> None:
    q, k, v = qkv(256)
    want = dense(q, k, v)
    errors = []
    for size in (4, 32, 256):
        draws = [HyperAttention(8, 5, 16, size, 16, seed=seed)(q, k, v).out for seed in range(8)]
        errors.append(torch.stack([(draw - want).norm() for draw in draws]).mean())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_planted_pairs_are_found_by_the_hash() -> None:
    """Queries that nearly equal one key each: hashing finds it, a sample of the same size mostly does not."""
    q, k, v = (t.float() for t in qkv(512))
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    k = 4 * torch.nn.functional.normalize(k, dim=-1)
    q = 4 * k[:, :, order] + 0.01 * q
    want = dense(q, k, v)
    hashed = HyperAttention(8, 7, 32, 32, 16)(q, k, v).out
    sampled = HyperAttention(8, 1, 1, 64, 16)(q, k, v).out
    assert (hashed - want).norm() < 0.5 * (sampled - want).norm()


def test_the_hash_walks_the_gray_sequence() -> None:
    attend = HyperAttention(3, num_projections=3)
    attend.projection = torch.eye(3)
    signs = torch.tensor([[(i >> b & 1) * 2.0 - 1 for b in range(3)] for i in range(8)])
    codes = attend.hash(signs)
    assert sorted(codes.tolist()) == list(range(8))
    assert codes.tolist() == [i ^ (i >> 1) for i in range(8)]


def test_gradients_do_not_pass_through_the_choice() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(16, heads=1))
    attend = HyperAttention(8, 2, 4, 3, 8)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, causal=True), (q, k, v), eps=1e-7, atol=1e-4)


def test_the_causal_form_hides_values_but_not_the_order_of_later_queries() -> None:
    """Why the module is noncausal."""
    q, k, v = qkv(32)
    attend = HyperAttention(8, 3, 4, 4, 8)
    before = attend(q, k, v, causal=True).out
    later_values = v.clone()
    later_values[:, :, 30] += 9.0
    torch.testing.assert_close(attend(q, k, later_values, causal=True).out[:, :, :30], before[:, :, :30])
    later_query = q.clone()
    later_query[:, :, 30] *= -1
    assert not torch.allclose(attend(later_query, k, v, causal=True).out[:, :, :30], before[:, :, :30])


def test_the_same_seed_gives_the_same_estimate() -> None:
    q, k, v = qkv(64)
    attend = HyperAttention(8, 4, 8, 8, 16)
    assert torch.equal(attend(q, k, v).out, attend(q, k, v).out)
    fresh = HyperAttention(8, 4, 8, 8, 16, seed=None)
    assert not torch.equal(fresh(q, k, v).out, fresh(q, k, v).out)


@pytest.mark.parametrize("name", ["num_projections", "block_size", "min_seq_len"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: expected at least 1, got 0"):
        HyperAttention(8, **{name: 0})


def test_bad_inputs() -> None:
    q, k, v = qkv(10)
    with pytest.raises(ShapeError, match="as many keys as queries"):
        HyperAttention(8)(q[:, :, :5], k, v, causal=True)
    with pytest.raises(ShapeError, match="same batch and heads"):
        HyperAttention(8)(q, k[:, :1], v)
    with pytest.raises(Unsupported, match="padding"):
        HyperSelfAttention(16, 2)(torch.zeros(1, 4, 16), valid=torch.tensor([[True, True, True, False]]))
