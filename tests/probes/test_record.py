"""`record` against the weights of eager attention, through padding, caches, GQA and sliding layers."""

from itertools import pairwise

import pytest
import torch

import regard
from regard.attention.statistics import distance_edges
from regard.errors import ArgumentError, Unsupported
from regard.probes import Recorder, Recording
from tests.tiny_models import NAMES, tiny


def tokens(batch=1, length=33, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def check(layer, weights, spans=None, rows=()):
    """A layer's record against weights (B, H, N, M)."""

    def close(a, b):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    n, m = weights.shape[-2:]
    close(layer.mass, weights.sum(2))
    close(layer.entropy, torch.special.entr(weights).sum(-1))
    close(layer.peak, weights.amax(-1))
    gap = (torch.arange(m - n, m)[:, None] - torch.arange(m)).abs()
    edges = distance_edges(m)
    for b, (low, high) in enumerate(pairwise(edges)):
        inside = (gap >= low) & (gap < high)
        close(layer.distance[..., b], (weights * inside).sum((-1, -2)))
    close(layer.spans[..., 0], weights[..., 0])
    for at, positions in enumerate((spans or {}).values(), 1):
        close(layer.spans[..., at], weights[..., list(positions)].sum(-1))
    close(layer.rows, weights[:, :, [r - (m - n) for r in rows]])


@pytest.mark.parametrize("name", [*NAMES, "mistral-sliding"])
def test_equals_eager_attention(name) -> None:
    model, ids = tiny(name, attn_implementation="eager"), tokens(2)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    spans = {"middle": range(10, 20), "odd": [1, 3, 5]}
    found = regard.record(model, ids, tokens=spans, queries=[-1, 4])
    assert sorted(found.layers) == [0, 1, 2]
    assert (found.spans, found.queries, found.length) == (("first", "middle", "odd"), (4, 32), 33)
    for i, layer in found.layers.items():
        check(layer, expected[i], spans, found.queries)
        torch.testing.assert_close(layer.mass.sum(-1), torch.full((2, 4), 33.0))  # one per query


def test_padding_does_not_count() -> None:
    model, ids = tiny("llama", attn_implementation="eager"), tokens(2, 20)
    padding = torch.ones_like(ids)
    padding[1, :7] = 0
    with torch.no_grad():
        alone = model(ids[1:, 7:], output_attentions=True).attentions
    found = regard.record(model, {"input_ids": ids, "attention_mask": padding})
    assert found.counted.tolist() == [20, 13]
    for i, layer in found.layers.items():
        torch.testing.assert_close(layer.mass[1:, :, 7:], alone[i].sum(2), atol=1e-5, rtol=1e-4)
        assert not layer.mass[1, :, :7].any()
        assert not layer.entropy[1, :, :7].any()
        torch.testing.assert_close(found.mean_entropy()[i][1:], torch.special.entr(alone[i]).sum(-1).mean(-1))


def test_generation_continues_the_record() -> None:
    model, ids = tiny("llama", attn_implementation="eager"), tokens(1, 12)
    found = regard.record(model, ids, max_new_tokens=5, queries=[3, 14])
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=5, do_sample=False)[:, :-1]  # the last is never read
        expected = model(whole, output_attentions=True).attentions
    assert found.counted.tolist() == [whole.shape[1]]
    for i, layer in found.layers.items():
        check(layer, expected[i], rows=(3, 14))


def test_layers_and_heads_are_chosen() -> None:
    model, ids = tiny("llama"), tokens(1, 15)
    every = regard.record(model, ids, queries=[-1])
    some = regard.record(model, ids, layers=[2, 0], heads=[3, 1], queries=[-1])
    assert some.heads == (3, 1)
    differences = some.compare(every.select(layers=sorted(some.layers), heads=[3, 1]))
    assert all(d < 1e-6 for layer in differences.values() for d in layer.values())
    with pytest.raises(ArgumentError, match="heads: recorded were"):
        some.select(heads=[0])
    with pytest.raises(ArgumentError, match="other: expected the same"):
        some.compare(every)


def test_spans_are_chosen() -> None:
    found = regard.record(tiny("llama"), tokens(1, 12), tokens={"a": range(4), "b": range(4, 12)})
    part = found.select(spans=["b"], heads=[2])
    assert part.spans == ("b",)
    assert part.span("b")[1].equal(found.span("b")[1][:, [2]])
    with pytest.raises(ArgumentError, match=r"spans: recorded were \['a', 'b', 'first'\], not \['c'\]"):
        found.select(spans=["c"])


def test_a_recording_is_saved_and_loaded(tmp_path) -> None:
    found = regard.record(tiny("llama"), tokens(2, 9), tokens={"all": range(9)}, queries=[2])
    found.save(tmp_path / "new" / "one")
    loaded = Recording.load(tmp_path / "new" / "one")
    assert (loaded.spans, loaded.queries, loaded.heads) == (found.spans, found.queries, found.heads)
    assert loaded.counted.equal(found.counted)
    assert all(d == 0 for layer in loaded.compare(found).values() for d in layer.values())
    with pytest.raises(ArgumentError, match="folder: expected one"):
        Recording.load(tmp_path)


def test_summaries() -> None:
    found = regard.record(tiny("llama"), tokens(1, 16), tokens={"all": range(16)})
    for i in found.layers:
        torch.testing.assert_close(found.span("all")[i], torch.ones(1, 4))
        assert (found.span("first")[i] > 1 / 16).all()  # every query sees it
        assert (found.mean_distance()[i] > 0).all()
    with pytest.raises(ArgumentError, match="the spans are first, all"):
        found.span("none")


def test_long_prompts_are_read_in_blocks(monkeypatch) -> None:
    model, ids = tiny("gemma3"), tokens(2, 40)
    whole = regard.record(model, ids, queries=[7, 20])
    monkeypatch.setattr("regard.attention.statistics._CHUNK_WEIGHTS", 2 * 4 * 40 * 3)
    for layer in regard.record(model, ids, queries=[7, 20]).compare(whole).values():
        assert max(layer.values()) < 1e-4


def test_bad_arguments_and_models_are_named() -> None:
    model, ids = tiny("llama"), tokens(1, 10)
    with pytest.raises(ArgumentError, match=r"layers: the model has layers 0\.\.2"):
        regard.record(model, ids, layers=[3])
    with pytest.raises(ArgumentError, match=r"heads: expected some of 0\.\.3"):
        regard.record(model, ids, heads=[4])
    with pytest.raises(ArgumentError, match="queries: the weights asked for need 480 bytes"):
        regard.record(model, ids, queries=[1], max_bytes=100)
    with pytest.raises(ArgumentError, match="queries: the input has 10 tokens"):
        regard.record(model, ids, queries=[-11])
    with pytest.raises(ArgumentError, match="tokens: 'x' has positions below 0"):
        regard.record(model, ids, tokens={"x": [-1]})
    with pytest.raises(ArgumentError, match="nothing was recorded"):
        _ = Recorder().recording
    with pytest.raises(Unsupported, match="keys were dropped"):
        regard.record(tiny("mistral-sliding"), tokens(1, 14), max_new_tokens=4)
