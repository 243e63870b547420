"""Sigmoid attention against plain loops, its parts adding up, and its beginning."""

import math

import pytest
import torch

from regard import masks
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.heads import sigmoid
from regard.mechanisms.heads.sigmoid import SigmoidAttention, SigmoidBlock, sigmoid_attention


def qkv(n: int = 7, m: int = 7):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 2, length, 3, dtype=torch.float64, generator=generator) for length in (n, m, m))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [2, 256])
def test_it_is_its_double_sum(causal: bool, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(sigmoid, "_CHUNK", chunk)
    q, k, v = qkv()
    slopes, valid = torch.tensor([0.5, 0.25]), torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    mask = masks.padding(valid) & masks.causal() if causal else masks.padding(valid)
    got = sigmoid_attention(q, k, v, mask=mask, logit_bias=-1.0, temperature=0.3, slopes=slopes)
    want = torch.zeros_like(got)
    for b in range(2):
        for h in range(2):
            for i in range(7):
                for j in range(i + 1 if causal else 7):
                    if valid[b, j]:
                        logit = (q[b, h, i] @ k[b, h, j] / 3**0.5 + slopes[h] * (j - i)) * math.exp(0.3) - 1.0
                        want[b, h, i] += v[b, h, j] / (1 + torch.exp(-logit))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # bias and temperature are float32


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & masks.sliding_window(3),
        masks.per_head([masks.causal(), masks.causal() & masks.sliding_window(2)]),
        masks.from_function(lambda b, h, i, j: (j >= 6) & (i < 4)),  # the last queries see nothing
        torch.arange(9) % 2 == 0,
        None,
    ],
    ids=["window", "per-head", "nothing", "tensor", "none"],
)
def test_any_mask_only_hides_keys(mask, monkeypatch) -> None:
    monkeypatch.setattr(sigmoid, "_CHUNK", 2)
    q, k, v = qkv(9, 9)
    slopes = torch.tensor([0.5, 0.25])
    weights = (q @ k.mT / 3**0.5 + slopes[:, None, None] * (torch.arange(9) - torch.arange(9)[:, None] - 2)).sigmoid()
    dense = torch.ones(9, 9) if mask is None else mask if isinstance(mask, torch.Tensor) else mask.dense(9, 9)
    want = (weights * dense) @ v
    torch.testing.assert_close(sigmoid_attention(q, k, v, mask=mask, slopes=slopes, past=2), want)


def test_keys_out_of_reach_are_not_computed(monkeypatch) -> None:
    """In a row of chunks, the first of ten may only see itself."""
    monkeypatch.setattr(sigmoid, "_CHUNK", 2)
    q, k, v = qkv(20, 20)
    k[:, :, 2:] = torch.nan  # would show in 0 · NaN
    v[:, :, 2:] = torch.nan
    assert bool(sigmoid_attention(q, k, v, mask=masks.causal())[:, :, :2].isfinite().all())


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ShapeError, match="mask"):
        sigmoid_attention(*qkv(), mask=masks.from_dense(torch.ones(3, 3, dtype=torch.bool)))


def test_gradients_also_where_rows_are_computed_again(monkeypatch) -> None:
    q, k, v = (t[:1].requires_grad_() for t in qkv(5, 5))
    for chunk in (256, 2):
        monkeypatch.setattr(sigmoid, "_CHUNK", chunk)
        assert torch.autograd.gradcheck(lambda *t: sigmoid_attention(*t, mask=masks.causal()), (q, k, v))


def test_parts_of_the_keys_add_up() -> None:
    q, k, v = qkv(4, 9)
    both = sigmoid_attention(q, k, v)
    parts = sigmoid_attention(q, k[:, :, :4], v[:, :, :4]) + sigmoid_attention(q, k[:, :, 4:], v[:, :, 4:])
    torch.testing.assert_close(both, parts)


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = qkv()
    valid = torch.zeros(2, 7, dtype=torch.bool)
    assert torch.equal(sigmoid_attention(q, k, v, mask=masks.padding(valid)), torch.zeros_like(q))


def test_the_bias_sets_the_size_of_the_first_outputs() -> None:
    """Without -log n a row weighs n / 2 keys at the start; with it about one."""
    torch.manual_seed(0)
    x = torch.randn(1, 256, 32)
    with_bias = SigmoidAttention(32, 4, max_length=256, causal=False)
    without = SigmoidAttention(32, 4, logit_bias=0.0, causal=False)
    without.load_state_dict({**with_bias.state_dict(), "logit_bias": torch.zeros(1)})
    assert without(x).norm() > 10 * with_bias(x).norm()


def test_cross_attention_reads_the_context() -> None:
    layer = SigmoidAttention(8, 2, causal=False)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    q, k, v = layer.qkv(x, context)
    want = layer.o_proj(sigmoid_attention(q, k, v, logit_bias=layer.logit_bias).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, context), want)


def test_the_hybrid_block_norms_the_attentions_output() -> None:
    torch.manual_seed(0)
    block = SigmoidBlock(SigmoidAttention(8, 2), layer_scale=1.0, hybrid_norm=True)
    x = torch.randn(1, 4, 8)
    middle = x + torch.nn.functional.layer_norm(block.attn(block.norm1(x)), (8,))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalise": "rows"}, "normalise: expected"),
        ({"max_length": 0}, "max_length: expected at least 1"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        SigmoidAttention(**{"dim": 16, "num_heads": 4, **config})
