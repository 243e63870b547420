"""PatternProbe: the mass it measures is the attention that ran."""

from itertools import pairwise

import pytest
import torch

import regard
from regard.errors import ArgumentError
from regard.methods import parse
from regard.probes import PatternProbe
from tests.tiny_models import NAMES, tiny


def tokens(batch=1, length=33, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, ids, new=0, **kwargs):
    out = model(ids[:, : ids.shape[1] - new], use_cache=True, **kwargs)
    for i in range(ids.shape[1] - new, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
    return out


def binned(weights, edges, bins):
    """Eager weights (B, H, N, M) as the probe bins them: rows averaged, columns summed."""
    columns = [weights[..., edges[b] : edges[b + 1]].sum(-1) for b in range(bins)]
    weights = torch.stack([*columns, weights[..., edges[bins] :].sum(-1)], dim=-1)
    return torch.stack([weights[:, :, edges[b] : edges[b + 1]].mean(2) for b in range(bins)], dim=2)


@pytest.mark.parametrize("name", [*NAMES, "mistral-sliding"])
def test_equals_eager_attention_in_bins(name):
    model, ids = tiny(name, attn_implementation="eager"), tokens(2)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    probe = PatternProbe(bins=5)
    with regard.apply(model, probe):
        run(model, ids)
    assert sorted(probe.patterns) == [0, 1, 2]
    for layer, pattern in probe.patterns.items():
        assert pattern.edges == (0, 6, 13, 19, 26, 33)
        torch.testing.assert_close(pattern.prompt, binned(expected[layer], pattern.edges, 5), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_decoded_rows_equal_eager_attention(name):
    model, ids, new = tiny(name, attn_implementation="eager"), tokens(length=37), 4
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    probe = PatternProbe(bins=5)
    with regard.apply(model, probe):
        run(model, ids, new)
    for layer, pattern in probe.patterns.items():
        assert len(pattern.decoded) == new
        for i, row in enumerate(pattern.decoded):
            weights = expected[layer][:, :, 33 + i]
            edges = (*pattern.edges, 37)
            wanted = torch.stack([weights[..., a:b].sum(-1) for a, b in pairwise(edges)], dim=-1)
            torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        "sliding-window(window_size=9)",
        "power-attention(block_size=2)",
        "streaming-llm(start_size=2, recent_size=12)",
        "h2o(budget=0.4)",
        "h2o(budget=0.4, positions='slot')",
        "xkv(rank=4, group_size=3)",
        "longheads(window_size=4, atten_length=16)",
        "dhsa(budget=0.4, block_size=4, global_tokens=2, local_tokens=4, instruction_tokens=4, chunk_size=4)",
    ],
)
def test_rows_sum_to_one_under_a_method(method):
    model, ids = tiny("llama"), tokens(length=37)
    probe = PatternProbe(bins=8)
    with regard.apply(model, [*parse(method), probe]):
        run(model, ids, new=3)
    for pattern in probe.patterns.values():
        torch.testing.assert_close(pattern.prompt.sum(-1), torch.ones(1, 4, 8))
        for row in pattern.decoded:
            torch.testing.assert_close(row.sum(-1), torch.ones(1, 4))


def test_shows_what_a_window_hides():
    model, ids = tiny("llama"), tokens(length=64)
    probe = PatternProbe(bins=8)
    with regard.apply(model, [*parse("sliding-window(window_size=8)"), probe]):
        run(model, ids, new=0)
    mass = probe.patterns[1].prompt[0, 0, :, :-1]
    far = torch.ones(8, 8).tril(-2).bool()
    assert mass[far].max() == 0
    assert mass.diagonal().min() > 0


def test_shows_what_a_cache_dropped():
    model, ids = tiny("llama"), tokens(length=65)
    probe = PatternProbe(bins=64)
    with regard.apply(model, [*parse("streaming-llm(start_size=2, recent_size=10)"), probe]):
        run(model, ids, new=1)
    for pattern in probe.patterns.values():
        assert (pattern.prompt[0, :, -1, :-1] > 0).all()  # the prompt still attends to everything
        (row,) = pattern.decoded
        held = {*range(2), *range(54, 64), 64}
        assert {b for b in range(65) if row[0, :, b].min() > 0} == held
        assert row[0].sum() == pytest.approx(4, abs=1e-4)


def test_every_head_shows_its_own_heavy_hitters():
    model, ids = tiny("llama"), tokens(length=65)
    probe = PatternProbe(bins=64, layers=[1])
    with regard.apply(model, [*parse("h2o(hh_size=8, recent_size=6)"), probe]):
        out = run(model, ids[:, :64])
        slots = out.past_key_values.layers[1].slots.positions[0]  # (Hk, 14)
        with torch.no_grad():
            model(ids[:, 64:], past_key_values=out.past_key_values)
    (row,) = probe.patterns[1].decoded
    for head in range(4):
        assert set(row[0, head].nonzero().flatten().tolist()) == {*slots[head // 2].tolist(), 64}


def test_left_padding_counts_for_nothing():
    model, ids = tiny("llama"), tokens()
    alone, padded = PatternProbe(bins=4), PatternProbe(bins=4)
    with regard.apply(model, alone):
        run(model, ids)
    pad = 7
    batch = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(batch)
    mask[:, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with regard.apply(model, padded):
        run(model, batch, attention_mask=mask, position_ids=positions)
    for layer in range(3):
        torch.testing.assert_close(padded.patterns[layer].prompt, alone.patterns[layer].prompt, atol=1e-5, rtol=1e-4)


def test_changes_nothing_and_keeps_to_its_layers():
    model, ids = tiny("qwen3"), tokens()
    plain = run(model, ids, new=2).logits
    probe = PatternProbe(bins=4, layers=[1])
    with regard.apply(model, probe):
        torch.testing.assert_close(run(model, ids, new=2).logits, plain, atol=2e-5, rtol=1e-4)
    assert list(probe.patterns) == [1]


def test_a_new_prompt_is_a_new_record():
    model = tiny("llama")
    probe = PatternProbe(bins=4)
    with regard.apply(model, probe):
        run(model, tokens(length=20), new=4)
        run(model, tokens(length=13), new=1)
    assert probe.patterns[0].edges[-1] == 12
    assert len(probe.patterns[0].decoded) == 1


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="bins must be at least 1, got 0"):
        PatternProbe(bins=0)
    with (
        pytest.raises(ArgumentError, match=r"layers: the model has layers 0\.\.2, got \[7\]"),
        regard.apply(tiny("llama"), PatternProbe(layers=[7])),
    ):
        pass
