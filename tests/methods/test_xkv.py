"""xKV on models: against a simulation with torch's own SVD, what it holds, and what it frees."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import regard
from regard.cache import nbytes
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.xkv import XKV
from tests.methods.naive_llama import NaiveLlama
from tests.tiny_models import tiny

TOKENS = torch.randint(3, 97, (31,), generator=torch.Generator().manual_seed(0)).tolist()
PIECES = [TOKENS[:13], *([t] for t in TOKENS[13:19]), TOKENS[19:25], *([t] for t in TOKENS[25:])]


def run(model, method, pieces):
    """Logits of the pieces of one text, fed one after the other, and the cache."""
    cache, out = DynamicCache(config=model.config), []
    with regard.apply(model, method), torch.no_grad():
        for piece in pieces:
            out.append(model(torch.tensor([piece]), past_key_values=cache).logits[0])
    return torch.cat(out), cache


def simulation(model, groups, rank_k, rank_v, sinks):
    """Every prompt's end replaces all keys and values of a group but the sinks' by their truncated SVD."""
    naive = NaiveLlama(model, after=lambda *_: None)

    def truncate(name, group, rank):
        heads = [entries[sinks:] for layer in group for entries in naive.cache[layer]]
        x = torch.cat([torch.stack([getattr(entry, name) for entry in entries]) for entries in heads], dim=1)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        parts = ((u[:, :rank] * s[:rank]) @ v[:rank]).split(naive.dim, dim=1)
        for entries, part in zip(heads, parts, strict=True):
            for entry, row in zip(entries, part, strict=True):
                setattr(entry, name, row)

    def compress(layer, heads, new):
        for group in groups:
            if new > 1 and layer == group[-1]:
                truncate("key", group, rank_k)
                truncate("value", group, rank_v)

    naive.after = compress
    return naive


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"group_size": 2}, [[0, 1], [2]]),
        ({"group_size": 3, "store": "dense"}, [[0, 1, 2]]),
        ({"group_size": 3, "start_layer": 1}, [[1, 2]]),
        ({"group_size": 1, "start_layer": 1, "end_layer": 1}, [[1]]),
        ({"groups": [[2, 0]]}, [[0, 2]]),
        ({"group_size": 2, "rank_k": [5, 5], "rank_v": [7, 7]}, [[0, 1], [2]]),
    ],
    ids=str,
)
def test_equals_a_simulation(options, groups, sinks):
    """Prompt, single tokens, a second prompt, single tokens."""
    model = tiny("llama")
    naive = simulation(model, groups, 5, 7, sinks)
    expected = torch.cat([naive(piece) for piece in PIECES])
    got, _ = run(model, XKV(**{"rank_k": 5, "rank_v": 7, "sink_size": sinks, **options}), PIECES)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_parts_that_are_not_merged_stay():
    model = tiny("llama")
    for method, name in ((XKV(rank=3, merge_key=False), "keys"), (XKV(rank=3, merge_value=False), "values")):
        _, cache = run(model, method, [TOKENS[:20]])
        for layer in cache.layers:
            other = {"keys": "values", "values": "keys"}[name]
            assert getattr(layer, name).shape[2] == 20
            assert getattr(layer, other).shape[2] == 0
            assert layer.factors.keys() == {other}


@pytest.mark.parametrize("sinks", [0, 4])
def test_holds_what_it_says(sinks):
    """After the prompt, per group: N·r + r·G·d numbers and the sinks, for keys and for values each.

    And for bookkeeping an int32 position per token and layer, and where each row's sinks are, per group.
    """
    model, n, d = tiny("llama", num_hidden_layers=5), 300, 2 * 8
    ids = torch.randint(3, 97, (2, n), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with regard.apply(model, XKV(rank_k=6, rank_v=9, group_size=2, sink_size=sinks)), torch.no_grad():
        model(ids, past_key_values=cache)
        groups = [2, 2, 1]  # layers
        floats = sum(n * r + r * size * d + sinks * size * d for size in groups for r in (6, 9))
        places = 2 * 8 * sinks * len(groups)
        assert nbytes(cache) == 2 * 4 * floats + places + 5 * 4 * n  # both rows have the same positions
        assert nbytes(cache) < 0.5 * 2 * 2 * 5 * n * d * 4
        model(ids[:, :1], past_key_values=cache)  # a token more, and now each row has its own positions
        assert nbytes(cache) == 2 * (4 * floats + 5 * 4 * (n + 1) + 2 * 4 * 5 * d) + places


def test_originals_are_freed():
    model, kept = tiny("llama"), []

    class Watching(XKV):
        def after(self, call):
            kept.extend(weakref.ref(x.untyped_storage()) for x in (call.layer.keys, call.layer.values))
            super().after(call)

    with regard.apply(model, Watching(rank=4, group_size=3)), torch.no_grad():
        out = model(torch.tensor([TOKENS]))
    gc.collect()
    assert len(kept) == 6
    assert [ref() for ref in kept] == [None] * 6
    assert out.past_key_values.get_seq_length() == len(TOKENS)


def test_dense_storage_saves_nothing_but_gives_the_same():
    model = tiny("llama")
    factored, _ = run(model, XKV(rank=5), PIECES)
    dense, large = run(model, XKV(rank=5, store="dense"), PIECES)
    torch.testing.assert_close(dense, factored, atol=1e-4, rtol=1e-4)
    _, plain = run(model, [], PIECES)
    assert nbytes(large) >= nbytes(plain)


def test_ranks_as_shares_of_the_width():
    _, cache = run(tiny("llama"), XKV(rank_k=0.25, rank_v=0.5, group_size=2), [TOKENS])
    assert [layer.factors["keys"].shape for layer in cache.layers] == [(1, 8, 16), (1, 8, 16), (1, 4, 16)]
    assert [layer.factors["values"].shape for layer in cache.layers] == [(1, 16, 16), (1, 16, 16), (1, 8, 16)]


def test_randomized_is_close_where_the_spectrum_falls():
    model = tiny("llama")
    torch.manual_seed(0)
    exact, _ = run(model, XKV(rank=12, group_size=3), PIECES)
    sampled, _ = run(model, XKV(rank=12, group_size=3, randomized=True), PIECES)
    dense, _ = run(model, [], PIECES)
    assert (sampled - exact).abs().max() < (exact - dense).abs().max()


def test_minicache_merges_pairs_at_the_prompts_end():
    model = tiny("llama", num_hidden_layers=4)
    merge = {"layer_merge_impl": "slerp", "group_size": 2}
    dense, plain = run(model, [], PIECES)
    nothing, _ = run(model, XKV(**merge), PIECES)  # gamma = 1
    torch.testing.assert_close(nothing, dense, atol=1e-4, rtol=1e-4)
    merged, cache = run(model, XKV(**merge, slerp_gamma=0.2), [TOKENS])
    torch.testing.assert_close(merged, run(model, [], [TOKENS])[0], atol=1e-4, rtol=1e-4)  # the prompt sees originals
    unit = [torch.nn.functional.normalize(layer.values, dim=-1) for layer in cache.layers]
    before = [torch.nn.functional.normalize(layer.values, dim=-1) for layer in plain.layers]
    for a, b in ((0, 1), (2, 3)):
        same = (unit[a] - unit[b]).norm(dim=-1) < 1e-5
        angle = (before[a] * before[b]).sum(-1).acos()
        threshold = angle.min() + 0.2 * (angle.max() - angle.min())
        assert torch.equal(same, angle > threshold)
        assert same.any()
        assert not same.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a number of at least 1 or a share"),
        ({"rank_k": 1.5}, "rank_k must be a number of at least 1 or a share .* got 1.5"),
        ({"rank_v": [4, True]}, "rank_v must be a number of at least 1 or a share .* got True"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"sink_size": -1}, "sink_size must be at least 0, got -1"),
        ({"start_layer": -1}, "start_layer must be at least 0"),
        ({"store": "sparse"}, "store must be factored or dense, got 'sparse'"),
        ({"layer_merge_impl": "qr"}, "layer_merge_impl must be svd or slerp, got 'qr'"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        XKV(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": [[0, 1], [1, 2]]}, "groups must name layers with full context once each"),
        ({"groups": [[0, 3]]}, "groups must name layers with full context once each"),
        ({"rank_k": [4], "group_size": 2}, "rank_k has 1 ranks, expected one for each of 2 groups"),
        ({"layer_merge_impl": "slerp", "group_size": 2}, r"merges pairs of layers, got groups \[\[0, 1\], \[2\]\]"),
    ],
)
def test_arguments_that_do_not_fit_the_model(arguments, message):
    with pytest.raises(ArgumentError, match=message), regard.apply(tiny("llama"), XKV(**arguments)):
        pass


def test_layers_outside_the_model_are_refused():
    with (
        pytest.raises(Unsupported, match="none among those asked for"),
        regard.apply(tiny("llama"), XKV(start_layer=7)),
    ):
        pass
