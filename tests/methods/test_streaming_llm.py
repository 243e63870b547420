"""StreamingLLM on models: against a simulation written out token by token, and what it holds."""

import pytest
import torch
from transformers import DynamicCache

import regard
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.streaming_llm import StreamingLLM
from tests.methods.naive_llama import NaiveLlama
from tests.tiny_models import tiny

TOKENS = torch.randint(3, 97, (31,), generator=torch.Generator().manual_seed(0)).tolist()


def run(model, method, pieces):
    """Logits of the pieces of one text, fed one after the other, and the cache."""
    cache, out = DynamicCache(config=model.config), []
    with regard.apply(model, method), torch.no_grad():
        for piece in pieces:
            out.append(model(torch.tensor([piece]), past_key_values=cache).logits[0])
    return torch.cat(out), cache


@pytest.mark.parametrize("layers", [None, [0], [1]], ids=["all", "first", "middle"])
@pytest.mark.parametrize("start", [0, 2])
def test_equals_a_simulation(start, layers):
    """Prompt, single tokens, a second prompt, single tokens; layers left out keep everything."""
    model = tiny("llama")
    pieces = [TOKENS[:13], *([t] for t in TOKENS[13:19]), TOKENS[19:25], *([t] for t in TOKENS[25:])]

    def acts(layer):
        return layers is None or layer in layers

    def keep_ends(layer, heads, new):
        for entries in heads:
            if acts(layer) and len(entries) > start + 5:
                entries[:] = entries[:start] + entries[-5:]

    naive = NaiveLlama(model, keep_ends, slots=acts)
    expected = torch.cat([naive(piece) for piece in pieces])
    got, cache = run(model, StreamingLLM(start_size=start, recent_size=5, layers=layers), pieces)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for layer, heads in zip(cache.layers, naive.cache, strict=True):
        assert layer.keys.shape[2] == len(heads[0])
        torch.testing.assert_close(layer.values[0, 1], torch.stack([e.value for e in heads[1]]))
    if layers is None:
        assert cache.layers[0].slots.positions[0, 0].tolist() == [e.position for e in naive.cache[0][0]]


def test_holds_what_it_says_however_long():
    model = tiny("llama")
    sizes = set()
    cache = DynamicCache(config=model.config)
    with regard.apply(model, StreamingLLM(start_size=4, recent_size=12)), torch.no_grad():
        out = model(torch.tensor([TOKENS]), past_key_values=cache)
        for _ in range(150):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache)
            sizes.add((cache.layers[0].keys.shape[2], regard.cache.nbytes(cache)))
    per_layer = 16 * (2 * 2 * 8 * 4 + 4)  # 16 tokens: keys and values of two heads of 8 floats, one int32 position
    assert sizes == {(16, 3 * per_layer)}
    assert cache.get_seq_length() == len(TOKENS) + 150


def test_positions_in_the_text_make_no_difference():
    model = tiny("llama", max_position_embeddings=16)
    logits = []
    for offset in (0, 1000):
        cache = DynamicCache(config=model.config)
        with regard.apply(model, StreamingLLM(start_size=2, recent_size=6)), torch.no_grad():
            for start, stop in ((0, 9), *((t, t + 1) for t in range(9, 25))):
                positions = torch.arange(start, stop)[None] + offset
                out = model(torch.tensor([TOKENS[start:stop]]), position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_budget_is_a_share_of_the_prompt():
    _, cache = run(tiny("llama"), StreamingLLM(budget=0.5), [TOKENS[:20], TOKENS[20:21], TOKENS[21:22]])
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10, 10]
    _, cache = run(tiny("llama"), StreamingLLM(budget=0.5), [TOKENS[:20], TOKENS[20:30], TOKENS[30:31]])
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 15, 15]


def test_making_room_by_hand():
    model = tiny("llama")
    method = StreamingLLM(start_size=2, recent_size=8)
    cache = DynamicCache(config=model.config)
    with regard.apply(model, method), torch.no_grad():
        model(torch.tensor([TOKENS[:20]]), past_key_values=cache)
        for layer in cache.layers:
            layer.evict_for_space(3)
        assert cache.layers[0].slots.positions[0, 0].tolist() == [0, 1, 15, 16, 17, 18, 19]
        model(torch.tensor([TOKENS[20:23]]), past_key_values=cache)
        assert cache.layers[0].length == 10
        for layer in cache.layers:
            layer.evict_range(1, 3)
        assert cache.layers[0].slots.positions[0, 0].tolist() == [0, 16, 17, 18, 19, 20, 21, 22]
        assert torch.isfinite(model(torch.tensor([TOKENS[23:24]]), past_key_values=cache).logits).all()


def test_without_a_cache_nothing_is_dropped():
    model = tiny("llama")
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits
        with regard.apply(model, StreamingLLM(start_size=1, recent_size=2)):
            got = model(torch.tensor([TOKENS]), use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_size": -1}, "start_size must be at least 0, got -1"),
        ({"recent_size": 0}, "recent_size must be at least 1, got 0"),
        ({"budget": 1.5}, "budget must be a share of the prompt, above 0 and at most 1, got 1.5"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        StreamingLLM(**arguments)


def test_models_without_rotary_embedding_are_refused():
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(Unsupported, match="re-assigns rotary positions"), regard.apply(model, StreamingLLM()):
        pass
