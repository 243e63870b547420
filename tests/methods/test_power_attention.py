"""PowerAttention against the formula of the paper; there is no published code to compare with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import regard
from regard import masks
from regard.errors import ArgumentError
from regard.methods.language.power_attention import PowerAttention
from tests.tiny_models import NAMES, tiny


def allowed(q: Tensor, k: Tensor, block: int, window: int, sinks: int) -> Tensor:
    """The pattern as the paper defines it, for positions q (N, 1) and k (M,)."""
    d = q // block - k // block
    power = (d & (d - 1)) == 0  # true for 0 and for powers of two
    return (d >= 0) & (power | (d < window) | (k // block < sinks)) & (k <= q)


def ids(n: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@given(
    n=st.integers(1, 70),
    past=st.integers(0, 50),
    block=st.integers(1, 9),
    window=st.integers(0, 4),
    sinks=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_attention_is_softmax_with_everything_else_at_minus_infinity(
    n: int, past: int, block: int, window: int, sinks: int
) -> None:
    m = past + n
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, size, 8, generator=g) for size in (n, m, m))
    mask = masks.power(block, window, sinks).shift(past) & masks.causal().shift(past)
    table = allowed(torch.arange(past, m)[:, None], torch.arange(m), block, window, sinks)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~table, -torch.inf)
    torch.testing.assert_close(regard.attention(q, k, v, mask=mask), scores.softmax(-1) @ v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("n", "layers", "most_keys"), [(64, 6, 7), (256, 8, 9)])
def test_reach_grows_exponentially(n: int, layers: int, most_keys: int) -> None:
    """log2 N layers reach everything; a sliding window of as many keys takes two and four times as many."""
    pattern = masks.power(1, 1, 0) & masks.causal()
    assert pattern.dense(n).sum(-1).max() == most_keys
    assert pattern.min_layers(n) == layers
    window = masks.sliding_window(most_keys) & masks.causal()
    assert window.min_layers(n) == -(-(n - 1) // (most_keys - 1))
    assert window.min_layers(n) == {64: 11, 256: 32}[n]
    dilated = masks.dilated(2 * n, 2) & masks.causal()
    assert dilated.min_layers(n) is None  # odd distances are never reached


def test_attended_pairs_grow_as_n_log_n() -> None:
    for n in (64, 1024):
        pairs = (masks.power(1, 1, 0) & masks.causal()).density(n) * n * n
        assert pairs == pytest.approx(sum(1 + (1 + math.floor(math.log2(i)) if i else 0) for i in range(n)))


def test_papers_setting_visits_few_blocks() -> None:
    """128 blocks of 256 tokens, five window blocks and a sink block."""
    structure = (masks.power(256, 5, 1) & masks.causal()).blocks(128 * 256, block_size=256)
    visited = max(sum(int(b - a) for a, b in zip(*structure.row(i)[:2], strict=True)) for i in range(128))
    assert visited <= 10


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_on_models(name: str) -> None:
    """Equal to the model's own eager attention under the pattern as a four-dimensional mask, cached or not."""
    n, method = 60, PowerAttention(block_size=4, window_blocks=2, sink_blocks=1)
    model, x = tiny(name, sliding_window=None), ids(n)
    if name == "gemma3":
        model = tiny(name, layer_types=["full_attention"] * 3)
    token = torch.arange(n)
    table = allowed(token[:, None], token, 4, 2, 1)
    model.set_attn_implementation("eager")
    bias = torch.zeros(n, n).masked_fill(~table, torch.finfo(torch.float32).min)[None, None].expand(2, -1, -1, -1)
    want = model(x, attention_mask=bias).logits
    with regard.apply(model, method):
        got = model(x).logits
        cache = DynamicCache(config=model.config)
        pieces = [model(x[:, a:b], past_key_values=cache).logits for a, b in ((0, 40), (40, 55), (55, 56), (56, 60))]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(pieces, dim=1), want, atol=1e-5, rtol=1e-5)
    assert (want - model(x).logits).abs().max() > 1e-2


@torch.no_grad()
def test_left_padding_and_generation() -> None:
    model, x = tiny("llama"), ids(40)
    padding = torch.ones_like(x)
    padding[0, :16] = 0
    method = PowerAttention(block_size=4, window_blocks=2, sink_blocks=0)
    with regard.apply(model, method):
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        both = model(x, attention_mask=padding, position_ids=positions).logits
        alone = model(x[:1, 16:]).logits  # a whole number of blocks later, the pattern is the same
        torch.testing.assert_close(both[:1, 16:], alone, atol=1e-5, rtol=1e-5)
        tokens = model.generate(x, attention_mask=padding, max_new_tokens=8, num_beams=2, pad_token_id=0)
    assert tokens.shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"window_blocks": -1}, "window_blocks must be at least 0, got -1"),
        ({"sink_blocks": -1}, "sink_blocks must be at least 0, got -1"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PowerAttention(**arguments)
