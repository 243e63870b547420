"""Core context aware attention against the card's loops, and where it equals full attention."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from regard.errors import ArgumentError, ShapeError
from regard.masks import ALL, NONE, SOME
from regard.mechanisms import SoftmaxAttention, state_bytes
from regard.mechanisms.sparse.core_context import CoreContextAttention, Far, Near, cca_attention
from regard.positions import rotary_angles, rotate


def oracle(q, k, v, g, s):
    """One head and batch item: q, k, v (N, D)."""
    rows = []
    for t in range(len(q)):
        j = max(0, (t + 1 - s) // g)
        keys, values = [], []
        for u in range(j):
            w = torch.softmax(q[u * g + g - 1] @ k[u * g : (u + 1) * g].T / math.sqrt(q.shape[-1]), 0)
            keys.append(w @ k[u * g : (u + 1) * g])
            values.append(w @ v[u * g : (u + 1) * g])
        keys = torch.stack([*keys, *k[j * g : t + 1]])
        values = torch.stack([*values, *v[j * g : t + 1]])
        rows.append(torch.softmax(q[t] @ keys.T / math.sqrt(q.shape[-1]), 0) @ values)
    return torch.stack(rows)


def qkv(n=23, heads=4, kv_heads=2, dim=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(2, h, n, dim, generator=generator, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("g", "s"), [(4, 5), (5, 1), (3, 8), (1, 2), (7, 30)])
def test_the_card_s_loops(g: int, s: int) -> None:
    q, k, v = qkv()
    got = cca_attention(q, k, v, g, s)
    for b in range(2):
        for h in range(4):
            torch.testing.assert_close(got[b, h], oracle(q[b, h], k[b, h // 2], v[b, h // 2], g, s))


def test_gradients() -> None:
    q, k, v = (t[:1, :2].requires_grad_() for t in qkv(n=7, heads=2, kv_heads=1, dim=2))
    assert torch.autograd.gradcheck(lambda *a: cca_attention(*a, 2, 2), (q, k, v))


@pytest.mark.parametrize(("g", "s"), [(1, 3), (4, 23), (4, 20)])
def test_full_attention_where_nothing_is_pooled(g: int, s: int) -> None:
    q, k, v = qkv()
    full = sdpa(q, *(t.repeat_interleave(2, 1) for t in (k, v)), is_causal=True)
    torch.testing.assert_close(cca_attention(q, k, v, g, s), full)


def test_the_weights_of_full_attention_fit() -> None:
    torch.manual_seed(0)
    softmax = SoftmaxAttention(16, 4, rope_theta=100.0)
    ours = CoreContextAttention(16, 4, group_size=4, local_size=32, rope_theta=100.0)
    ours.load_state_dict(softmax.state_dict())
    x = torch.randn(2, 30, 16)
    torch.testing.assert_close(ours(x), softmax(x), atol=1e-6, rtol=1e-5)


def test_later_tokens_leave_earlier_outputs_bitwise_equal() -> None:
    q, k, v = qkv(dtype=torch.float32)
    before = cca_attention(q, k, v, 4, 5)
    for t in (k, v, q):
        t[:, :, 17:] += 1.0
    assert torch.equal(cca_attention(q, k, v, 4, 5)[:, :, :17], before[:, :, :17])


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_other_pools(pool: str) -> None:
    q, k, v = qkv(n=12, kv_heads=4)
    got = cca_attention(q, k, v, 4, 2, pool=pool)[:, :, 11]

    def reduce(x):
        return {"mean": x.mean(2), "max": x.amax(2), "last": x[:, :, -1]}[pool]

    keys, values = (
        torch.cat([torch.stack([reduce(t[:, :, :4]), reduce(t[:, :, 4:8])], 2), t[:, :, 8:12]], 2) for t in (k, v)
    )
    torch.testing.assert_close(got, sdpa(q[:, :, 11:], keys, values)[:, :, 0])


def test_cores_at_the_last_position_of_their_group() -> None:
    torch.manual_seed(0)
    layer = CoreContextAttention(8, 1, group_size=3, local_size=2, rope_theta=100.0, core_position="last").double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    cos, sin = (a.double() for a in rotary_angles(torch.arange(9), 8, 100.0))
    raw, v = layer.k_proj(x)[0], layer.v_proj(x)[0]
    q, k = rotate(layer.q_proj(x)[0], cos, sin), rotate(raw, cos, sin)
    keys, values = [], []
    for u in range(2):
        group = slice(3 * u, 3 * u + 3)
        w = torch.softmax(q[3 * u + 2] @ k[group].T / math.sqrt(8), 0)
        keys.append(rotate((w @ raw[group])[None], cos[3 * u + 2 :][:1], sin[3 * u + 2 :][:1])[0])
        values.append(w @ v[group])
    keys, values = torch.stack([*keys, *k[6:9]]), torch.stack([*values, *v[6:9]])
    want = layer.o_proj(torch.softmax(q[8] @ keys.T / math.sqrt(8), 0) @ values)
    torch.testing.assert_close(layer(x)[0, 8], want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pool", ["cca", "mean", "max", "last"])
def test_padding_inside_groups_is_not_seen(pool: str) -> None:
    torch.manual_seed(0)
    layer = CoreContextAttention(16, 4, 2, group_size=4, local_size=3, pool=pool).eval()
    x = torch.randn(1, 20, 16)
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[:, [0, 1, 2, 3, 6, 7, 13]] = False  # one group is padding altogether, another ends in it
    other = torch.where(valid[..., None], x, 30.0)
    want, got = layer(x, valid=valid), layer(other, valid=valid)
    torch.testing.assert_close(got[valid], want[valid])
    state, pieces = None, []
    for piece, ok in zip(x.split(3, 1), valid.split(3, 1), strict=True):
        y, state = layer.stream(piece, state, valid=ok)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1)[valid], want[valid], atol=1e-6, rtol=1e-5)


def test_the_state_holds_cores_and_near_tokens_only() -> None:
    layer = CoreContextAttention(16, 4, group_size=8, local_size=12)
    state = None
    for piece in torch.randn(1, 200, 16).split(7, 1):
        _, state = layer.stream(piece, state)
        assert state.near.key.shape[2] < 12 + 8
        assert state.query.shape[2] < 8
    assert state.core.key.shape[2] == 200 // 8
    assert state_bytes(state) < 200 * 2 * 16 * 4 / 3


@pytest.mark.parametrize(("past", "start"), [(0, 0), (13, 4)])
def test_blocks_of_the_masks_agree_with_their_definition(past: int, start: int) -> None:
    for mask, keys in ((Far(4, 5, past), 6), (Near(4, 5, past, start), 30)):
        dense = mask.dense(17, keys).view(17, keys)
        for t in range(17):
            j = max(0, (past + t + 1 - 5) // 4)
            for u in range(keys):
                want = u < j if type(mask) is Far else 4 * j <= u + start <= past + t
                assert dense[t, u] == want
        grid = mask.blocks(17, keys, 4).grid()[0, 0]
        for i, j in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
            block = dense[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert grid[i, j] == (ALL if block.all() else SOME if block.any() else NONE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 0}, "group_size: expected at least 1, got 0"),
        ({"local_size": 0}, "local_size: expected at least 1, got 0"),
        ({"pool": "sum"}, "pool: expected one of"),
        ({"core_position": "first"}, "core_position: expected one of"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        CoreContextAttention(16, **config)


def test_queries_and_keys_of_different_tokens() -> None:
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="k: expected"):
        cca_attention(q[:, :, :5], k, v, 4, 5)
