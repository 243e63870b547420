"""VMoBA: its choice against plain loops, its attention against a dense mask, its limits."""

import itertools

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms import create
from regard.mechanisms.sparse.vmoba import (
    SCOPES,
    choose,
    partition,
    select_blocks,
    unpartition,
    vmoba_attention,
)

GRID = (2, 4, 6)
CHUNKS = [1, 0.5, (2, 3), (1, 2, 2)]


def qkv(seed: int = 0, batch: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, 48, 4, dtype=dtype, generator=generator) for _ in range(3))


def entries(scope: str, shape: tuple[int, int, int, int]):
    """The competing entries (b, c, h, n) of each scope, in plain loops."""
    b, c, h, n = (range(s) for s in shape)
    if scope == "query_head":
        return [[(i, x, j, s) for x in c] for i, j, s in itertools.product(b, h, n)]
    if scope == "block":
        return [[(i, x, j, s) for j in h for s in n] for i, x in itertools.product(b, c)]
    if scope == "head_global":
        return [[(i, x, j, s) for x in c for s in n] for i, j in itertools.product(b, h)]
    return [[(i, x, j, s) for x in c for j in h for s in n] for i in b]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_threshold_keeps_the_best_until_there_is_enough(scope: str, threshold: float) -> None:
    gate = torch.randn(2, 4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = (torch.arange(8) // 2 == torch.arange(4)[:, None])[None, :, None].expand_as(gate)
    got = select_blocks(gate, own, "threshold", scope, threshold, 1)
    want = own.clone()
    for competing in entries(scope, gate.shape):
        values = {entry: gate[entry].item() for entry in competing}
        low, high = min(values.values()), max(values.values())
        mass = {entry: (value - low) / (high - low) for entry, value in values.items()}
        total = sum(mass.values()) + 1e-6
        need = max(threshold - sum(m for entry, m in mass.items() if own[entry]) / total, 0.0)
        got_so_far = 0.0
        for entry in sorted((e for e in competing if not own[e]), key=lambda e: -mass[e]):
            want[entry] = True
            got_so_far += mass[entry]
            if got_so_far / total >= need:
                break
    assert torch.equal(got, want)


@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
def test_topk_keeps_so_many_per_query_on_average(scope: str) -> None:
    gate = torch.randn(2, 4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = (torch.arange(8) // 2 == torch.arange(4)[:, None])[None, :, None].expand_as(gate)
    got = select_blocks(gate, own, "topk", scope, 0.0, 2)
    assert bool((got | ~own).all())
    for competing in entries(scope, gate.shape):
        kept = [entry for entry in competing if got[entry]]
        assert len(kept) == 2 * len(competing) // 4
        worst = min(gate[e] for e in kept if not own[e])
        assert all(gate[e] <= worst for e in competing if not got[e])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scope", SCOPES)
def test_attention_is_dense_attention_under_the_choice(chunk, scope: str) -> None:
    q, k, v = qkv()
    got = vmoba_attention(q, k, v, GRID, chunk, scope=scope, threshold=0.4)
    pq, pk, pv = (partition(t, GRID, chunk) for t in (q, k, v))
    size = {1: 24, 0.5: 12, (2, 3): 12, (1, 2, 2): 4}[chunk]
    kept = choose(pq, pk, size, "threshold", scope, 0.4, 1)
    mask = kept.repeat_interleave(size, dim=-1)[..., :48]
    want = torch.nn.functional.scaled_dot_product_attention(pq, pk, pv, mask)
    torch.testing.assert_close(got, unpartition(want, GRID, chunk))
    assert 0 < mask.float().mean() < 1 or chunk == 1


@pytest.mark.parametrize("chunk", CHUNKS)
def test_keeping_everything_is_dense_attention(chunk) -> None:
    q, k, v = qkv()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for everything in ({"threshold": 1.0, "scope": "query_head"}, {"select": "topk", "topk": 12}):
        torch.testing.assert_close(vmoba_attention(q, k, v, GRID, chunk, **everything), dense)


def test_partition_puts_the_tokens_of_a_block_together() -> None:
    index = torch.arange(48.0).view(1, 1, 48, 1)
    t, h, w = torch.meshgrid(*(torch.arange(s) for s in GRID), indexing="ij")
    block = partition(index, GRID, (1, 2, 3)).flatten().long()
    for start in range(0, 48, 6):
        tokens = block[start : start + 6]
        box = {(int(t.flatten()[i]), int(h.flatten()[i]) // 2, int(w.flatten()[i]) // 3) for i in tokens}
        assert len(box) == 1
    torch.testing.assert_close(unpartition(partition(index, GRID, (1, 2, 3)), GRID, (1, 2, 3)), index)


def test_a_planted_block_is_found() -> None:
    """Queries that resemble one remote block reach it, at a small part of the pairs."""
    q, k, v = (t.float() for t in qkv(batch=1))
    direction = torch.randn(4, generator=torch.Generator().manual_seed(5))
    q, k = 0.1 * q, 0.1 * k
    q[:, :, :4] += 6 * direction
    k[:, :, 44:] += 6 * direction
    mask = choose(q, k, 4, "threshold", "query_head", 0.4, 1)
    assert bool(mask[:, :, :4, 11].all())
    assert mask[:, :, :4].float().mean() < 0.4
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, :4]
    got = vmoba_attention(q, k, v, (12, 2, 2), 1, scope="query_head", threshold=0.4)[:, :, :4]
    assert (got - dense).norm() / dense.norm() < 1e-2


def test_items_of_a_batch_do_not_compete_unless_asked() -> None:
    q, k, v = qkv()
    q[1] *= 10
    alone = vmoba_attention(q[:1], k[:1], v[:1], GRID, (1, 2, 2))
    torch.testing.assert_close(vmoba_attention(q, k, v, GRID, (1, 2, 2))[:1], alone)
    assert not torch.allclose(vmoba_attention(q, k, v, GRID, (1, 2, 2), across_batch=True)[:1], alone)


def test_gradients_flow_through_the_attention() -> None:
    q, k, v = (t[:, :1].requires_grad_() for t in qkv(batch=1))
    assert torch.autograd.gradcheck(
        lambda *t: vmoba_attention(*t, GRID, (1, 2, 2), threshold=0.3), (q, k, v), eps=1e-7, atol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chunks": ((3, 2),)}, "chunks: expected"),
        ({"chunks": (0,)}, "chunks: expected a positive number"),
        ({"select": "best"}, "select: expected one of threshold, topk"),
        ({"scope": "head"}, "scope: expected one of"),
        ({"select": "topk", "scope": "block"}, "scope: 'block' goes with"),
        ({"threshold": 1.5}, "threshold: expected a share"),
        ({"topk": 0}, "topk: expected at least 1"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        create("vmoba", **{"dim": 8, "num_heads": 2, "grid": GRID, "chunks": (1,), **config})


def test_bad_lengths() -> None:
    with pytest.raises(ShapeError, match="expected 48 tokens"):
        vmoba_attention(*(t[:, :, :40] for t in qkv()), GRID, 1)
