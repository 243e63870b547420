"""H2O on models: against a simulation written out head by head, and what it holds."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import regard
from regard import attention
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.h2o import H2O
from regard.sites import Method
from tests.methods.naive_llama import NaiveLlama
from tests.tiny_models import tiny

TOKENS = torch.randint(3, 97, (31,), generator=torch.Generator().manual_seed(0)).tolist()
PIECES = [TOKENS[:13], *([t] for t in TOKENS[13:19]), TOKENS[19:25], *([t] for t in TOKENS[25:])]


def run(model, methods, pieces, **kwargs):
    """Logits of the pieces of one text, fed one after the other, and the cache."""
    cache, out = DynamicCache(config=model.config), []
    with regard.apply(model, methods), torch.no_grad():
        for piece in pieces:
            out.append(model(torch.tensor([piece]), past_key_values=cache, **kwargs).logits[0])
    return torch.cat(out), cache


def simulation(model, hh_size, recent_size, normalise=False, slots=False, layers=range(3)):
    naive = NaiveLlama(model, after=lambda *_: None, slots=lambda layer: slots and layer in layers)

    def keep_best(layer, heads, new):
        last = naive.seen + new
        for entries in heads:
            if layer not in layers or len(entries) <= hh_size + recent_size:
                continue
            older, recent = entries[:-recent_size], entries[-recent_size:]
            ranked = sorted(older, key=lambda e: -(e.score / (last - e.position) if normalise else e.score))
            entries[:] = sorted(ranked[:hh_size], key=lambda e: e.position) + recent

    naive.after = keep_best
    return naive


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (H2O(hh_size=4, recent_size=3), {}),
        (H2O(hh_size=0, recent_size=5), {}),
        (H2O(hh_size=4, recent_size=3, normalise=True), {"normalise": True}),
        (H2O(hh_size=4, recent_size=3, positions="slot"), {"slots": True}),
        (H2O(hh_size=4, recent_size=3, layers=[0, 2]), {"layers": [0, 2]}),
    ],
    ids=str,
)
def test_equals_a_simulation(method, options):
    """Prompt, single tokens, a second prompt, single tokens; each key-value head keeps its own tokens."""
    model = tiny("llama")
    naive = simulation(model, method.hh_size, method.recent_size, **options)
    expected = torch.cat([naive(piece) for piece in PIECES])
    got, cache = run(model, method, PIECES)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    kept = cache.layers[0].slots.positions[0].tolist()
    assert kept == [[entry.position for entry in entries] for entries in naive.cache[0]]
    if method.hh_size:
        assert kept[0] != kept[1]
    for layer, heads in zip(cache.layers, naive.cache, strict=True):
        assert layer.keys.shape[2] == len(heads[0])
        torch.testing.assert_close(layer.values[0, 1], torch.stack([e.value for e in heads[1]]))


def test_scores_are_the_weights_a_method_asked_for():
    """Where the weights exist (asked for, or changed by a method), they are what is scored."""
    model, method = tiny("llama"), H2O(hh_size=4, recent_size=3)
    expected, by_lse = run(model, method, PIECES)
    got, by_weights = run(model, method, PIECES, output_attentions=True)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_weights.layers[2].scores, by_lse.layers[2].scores, atol=1e-4, rtol=1e-4)

    class Uniform(Method):
        def scores(self, call, scores):
            return torch.zeros_like(scores)

    _, cache = run(model, [method, Uniform()], [TOKENS[:9]])
    uniform = torch.tril(torch.ones(9, 9))
    received = (uniform / uniform.sum(-1, keepdim=True)).sum(0) * 2  # two query heads share a key-value head
    kept = cache.layers[0].slots.positions[0, 0].long()
    torch.testing.assert_close(cache.layers[0].scores[0, 0], received[kept])


def test_attention_that_hides_its_weights_is_refused():
    class Replace(Method):
        def attend(self, call):
            return attention.attention(call.query, call.key, call.payload, mask=call.mask, scale=call.scale)

    with pytest.raises(Unsupported, match="h2o scores keys by the attention they receive"):
        run(tiny("llama"), [H2O(), Replace()], PIECES)


def test_holds_what_it_says_however_long():
    model = tiny("llama")
    sizes = set()
    cache = DynamicCache(config=model.config)
    with regard.apply(model, H2O(hh_size=6, recent_size=10)), torch.no_grad():
        out = model(torch.tensor([TOKENS[:20]]), past_key_values=cache)
        for _ in range(200):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache)
            sizes.add((cache.layers[0].keys.shape[2], regard.cache.nbytes(cache)))
    per_head = 16 * (2 * 8 * 4 + 4 + 4)  # 16 tokens: key and value of 8 floats, an int32 position, a float score
    assert sizes == {(16, 3 * 2 * per_head)}


def test_budget_is_a_share_of_the_prompt():
    _, cache = run(tiny("llama"), H2O(budget=0.5), [TOKENS[:21], TOKENS[21:22], TOKENS[22:23]])
    assert [(layer.hh_size, layer.recent_size, layer.length) for layer in cache.layers] == [(5, 5, 10)] * 3
    _, cache = run(tiny("llama"), H2O(budget=0.5), [TOKENS[:21], TOKENS[21:29], TOKENS[29:30]])
    assert [layer.length for layer in cache.layers] == [14, 14, 14]


def test_prompts_never_form_the_matrix_of_weights():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    model, n = tiny("llama", max_position_embeddings=4096), 3000
    with regard.apply(model, H2O()), torch.no_grad(), Watch():
        model.model(torch.randint(3, 97, (1, n)))
    assert largest < model.config.num_attention_heads * n * n / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hh_size": 3}, "hh_size and recent_size go together, got hh_size=3, recent_size=None"),
        ({"hh_size": -1, "recent_size": 2}, "hh_size must be at least 0, got -1"),
        ({"hh_size": 1, "recent_size": 0}, "recent_size must be at least 1, got 0"),
        ({"budget": 0.0}, "budget must be a share of the prompt, above 0 and at most 1, got 0.0"),
        ({"positions": "relative"}, "positions must be 'absolute' or 'slot', got 'relative'"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        H2O(**arguments)
