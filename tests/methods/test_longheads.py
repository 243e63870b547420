"""LongHeads against loops written from its definition, and on models."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import regard
from regard.errors import ArgumentError, Unsupported
from regard.methods.language import longheads
from regard.methods.language.longheads import (
    ChunkedLayer,
    LongHeads,
    LongHeadsConfig,
    chunk_features,
    longheads_attention,
)
from regard.methods.language.power_attention import PowerAttention
from regard.positions import rotate
from regard.sites import Call, Method, Rotary
from tests.tiny_models import NAMES, tiny

W, N_CHUNKS = 8, 4
CONFIG = LongHeadsConfig(window_size=W, atten_length=W * N_CHUNKS, begin_selective_length=W * N_CHUNKS)
WITH_SELF = LongHeadsConfig(W, W * N_CHUNKS, W * N_CHUNKS, include_self=True)
SMALL: dict[str, Any] = {"window_size": W, "atten_length": W * N_CHUNKS}


class Angles(nn.Module):
    """Rotary angles in float64, so that a float64 comparison is exact."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64).repeat(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


ROTARY = Rotary(Angles())


def at(x: Tensor, positions: Any) -> Tensor:
    """Tokens x (T, 6) rotated to positions."""
    positions = torch.as_tensor(positions)
    cos, sin = ROTARY.angles(positions.reshape(-1), x)
    return rotate(x, cos, sin)


def qkv(n: int, heads: int = 4, kv_heads: int = 2, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, h, n, 6) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def all_chunk_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    whole = slice(q.shape[2] // W * W)
    return chunk_features(q[:, :, whole], k[:, :, whole], v[:, :, whole], ROTARY, W)[1]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def features_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk query and key of one chunk of one head, (W, 6) each."""
    q, k = at(q, range(W)), at(k, range(W))
    f = softmax_attention(q, k, v).mean(0, keepdim=True)
    return f[0], softmax_attention(f, k, k)[0]


def oracle(q: Tensor, k: Tensor, v: Tensor, i: int, include_self: bool) -> Tensor:
    """Output of query i of one head; q, k, v (M, 6) raw."""
    if i < CONFIG.begin_selective_length:
        return softmax_attention(at(q[i : i + 1], i), at(k[: i + 1], range(i + 1)), v[: i + 1])[0]
    own = i // W
    scores = {c: float(q[i] @ features_of(*(x[c * W : (c + 1) * W] for x in (q, k, v)))[1]) for c in range(1, own - 1)}
    best = sorted(scores, key=lambda c: -scores[c])[: N_CHUNKS - 3]
    chunks = sorted({0, own - 1, *best})
    tokens = [t for c in chunks for t in range(c * W, (c + 1) * W)] + list(range(own * W, i + include_self))
    position = (N_CHUNKS - 1) * W + i % W
    return softmax_attention(at(q[i : i + 1], position), at(k[tokens], range(len(tokens))), v[tokens])[0]


def expected(q: Tensor, k: Tensor, v: Tensor, include_self: bool) -> Tensor:
    """The oracle at every query of every head."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        out[b, h, i] = oracle(q[b, h], k[b, h // groups], v[b, h // groups], i, include_self)
    return out


# --- the functions --------------------------------------------------------------------------------------------------


def test_chunk_features() -> None:
    q, k, v = qkv(3 * W)
    f, r = chunk_features(q, k, v, ROTARY, W)
    assert f.shape == r.shape == (2, 4, 3, 6)
    chunk = slice(W, 2 * W)
    want_f, want_r = features_of(q[1, 3, chunk], k[1, 1, chunk], v[1, 1, chunk])
    torch.testing.assert_close(f[1, 3, 1], want_f)
    torch.testing.assert_close(r[1, 3, 1], want_r)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("n", [5, 32, 33, 61, 80])
def test_prefill(n: int, include_self: bool) -> None:
    q, k, v = qkv(n)
    config = WITH_SELF if include_self else CONFIG
    got = longheads_attention(q, k, v, all_chunk_keys(q, k, v), ROTARY, config)
    torch.testing.assert_close(got, expected(q, k, v, include_self), atol=1e-10, rtol=0)


def test_long_prompts_in_runs_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(90)
    chunk_key = all_chunk_keys(q, k, v)
    whole = longheads_attention(q, k, v, chunk_key, ROTARY, WITH_SELF)
    monkeypatch.setattr(longheads.attention, "_MEMORY", 1)
    torch.testing.assert_close(longheads_attention(q, k, v, chunk_key, ROTARY, WITH_SELF), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("past", [3, 31, 32, 50])
@pytest.mark.parametrize("new", [1, 2, 20])
def test_continuation_is_what_one_long_prompt_gives(past: int, new: int) -> None:
    q, k, v = qkv(past + new)
    chunk_key = all_chunk_keys(q, k, v)
    whole = longheads_attention(q, k, v, chunk_key, ROTARY, WITH_SELF)
    got = longheads_attention(q[:, :, past:], k, v, chunk_key, ROTARY, WITH_SELF)
    torch.testing.assert_close(got, whole[:, :, past:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("length", [CONFIG.begin_selective_length, 45, 48])
def test_published_decoding(length: int) -> None:
    """Complete chunks are the context: the first, the last and the best between; then the tail with the query."""
    q, k, v = qkv(length)
    got = longheads_attention(q[:, :, -1:], k, v, all_chunk_keys(q, k, v), ROTARY, CONFIG)
    complete = length // W
    for b, h in ((0, 0), (1, 3)):
        own_q, own_k, own_v = q[b, h], k[b, h // 2], v[b, h // 2]
        scores = {
            c: float(own_q[-1] @ features_of(*(x[c * W : (c + 1) * W] for x in (own_q, own_k, own_v)))[1])
            for c in range(1, complete - 1)
        }
        best = sorted(scores, key=lambda c: -scores[c])[: N_CHUNKS - 3]
        tokens = [t for c in sorted({0, complete - 1, *best}) for t in range(c * W, (c + 1) * W)]
        tokens += range(complete * W, length)
        want = softmax_attention(at(own_q[-1:], len(tokens) - 1), at(own_k[tokens], range(len(tokens))), own_v[tokens])
        torch.testing.assert_close(got[b, h], want, atol=1e-10, rtol=0)


def test_queries_attend_to_few_keys_at_linear_cost() -> None:
    """With one value column per key, the output is the weights: count them."""
    n = 160
    q, k, _ = qkv(n)
    chunk_key = all_chunk_keys(q, k, qkv(n)[2])
    weights = longheads_attention(q, k, torch.eye(n, dtype=q.dtype).expand(2, 2, n, n), chunk_key, ROTARY, WITH_SELF)
    seen = (weights > 0).sum(-1)
    assert seen.max() == WITH_SELF.atten_length
    i = torch.arange(n)
    want = torch.where(i < WITH_SELF.begin_selective_length, i + 1, (N_CHUNKS - 1) * W + i % W + 1)
    assert (seen == want).all()
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # the work: attended keys, and one score per chunk; a quarter of dense at five times the attended length
    pairs = int(seen[0, 0].sum()) + n * (n // W)
    assert pairs <= n * (WITH_SELF.atten_length + n // W)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"window_size": 64, "atten_length": 128}, "at least three chunks of window_size=64, got 128"),
        ({"begin_selective_length": 1000}, "multiple of window_size=64 and at least 1024, got 1000"),
        ({"begin_selective_length": 512}, "at least 1024, got 512"),
    ],
)
def test_refuses_sizes(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LongHeads(**arguments)


# --- on models ------------------------------------------------------------------------------------------------------


def ids(n: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_short_texts_are_dense(name: str) -> None:
    model, x = tiny(name), ids(W * N_CHUNKS)
    want = model(x).logits
    with regard.apply(model, LongHeads(**SMALL)):
        got = model(x).logits
        uncached = model(x, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(uncached, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_long_texts_are_not_dense_and_decoding_continues_the_prompt(name: str) -> None:
    """One forward, a prompt and single steps over chunk edges, and pieces of several tokens: all the same."""
    model, x = tiny(name), ids(75)
    dense = model(x).logits
    with regard.apply(model, LongHeads(**SMALL)):
        whole = model(x, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        cuts = [0, 30, 50, *range(51, 67), 75]
        pieces = [model(x[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)
    assert (whole - dense)[:, 40:].abs().max() > 1e-2


@torch.no_grad()
def test_model_computes_the_function_of_its_projections() -> None:
    """Un-rotating what the model rotated gives the raw queries and keys back."""
    model, x = tiny("llama", num_hidden_layers=1), ids(45, batch=1)
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[0].self_attn
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out)
        )
        for name in "qkv"
    ]
    hooks.append(attention.o_proj.register_forward_pre_hook(lambda module, args: seen.__setitem__("out", args[0])))
    with regard.apply(model, LongHeads(**SMALL)):
        model(x)
    for hook in hooks:
        hook.remove()
    q, k, v = (seen[name].unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv")
    rotary = Rotary(model.model.rotary_emb)
    whole = slice(45 // W * W)
    chunk_key = chunk_features(q[:, :, whole], k[:, :, whole], v[:, :, whole], rotary, W)[1]
    want = longheads_attention(q, k, v, chunk_key, rotary, WITH_SELF)
    torch.testing.assert_close(seen["out"], want.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


@dataclass(kw_only=True)
class Seen(Method):
    """Mixes one column per key along with the values: what comes out are the weights."""

    weights: list[Tensor] = field(default_factory=list)

    def qkv(self, call: Call) -> None:
        call.probe = torch.eye(call.key.shape[2])[None, None]

    def after(self, call: Call) -> None:
        self.weights.append(call.extra["probe"])


@torch.no_grad()
def test_probes_see_the_chosen_keys() -> None:
    model, x, seen = tiny("llama"), ids(70), Seen()
    with regard.apply(model, LongHeads(**SMALL)):
        want = model(x).logits
    with regard.apply(model, [LongHeads(**SMALL), seen]):
        torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)
    (weights, *_) = seen.weights
    assert weights.shape == (2, 4, 70, 70)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 70))
    assert (weights > 0).sum(-1).max() == W * N_CHUNKS


@torch.no_grad()
def test_generate_with_beams_and_sampling() -> None:
    model, x = tiny("llama"), ids(50)
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with regard.apply(model, LongHeads(**SMALL)):
        greedy = model.generate(x, **arguments)
        for length in range(50, 62):  # every token is the best after all before it, read in one forward
            best = model(greedy[:, :length], use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(best, greedy[:, length])
        beams = model.generate(x, **arguments, num_beams=3)
        several = model.generate(x, **{**arguments, "do_sample": True}, num_return_sequences=2)
    assert beams.shape == (2, 62)
    assert several.shape == (4, 62)


@torch.no_grad()
def test_beams_keep_their_own_chunks() -> None:
    """After reordering, the cache continues the sequences it now holds."""
    model, x = tiny("llama"), ids(53)
    with regard.apply(model, LongHeads(**SMALL)):
        cache = DynamicCache(config=model.config)
        model(x[:, :52], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(x[:, 52:], past_key_values=cache).logits[:, -1]
        want = model(torch.cat((x[:, :52].flip(0), x[:, 52:]), dim=1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_cache_holds_what_it_says() -> None:
    model, x = tiny("llama"), ids(45)
    with regard.apply(model, LongHeads(**SMALL)):
        cache = DynamicCache(config=model.config)
        model(x, past_key_values=cache)
        (layer, *_) = cache.layers
        assert isinstance(layer, ChunkedLayer)
        assert layer.chunk_key is not None
        assert layer.pending is not None
        assert layer.chunk_key.shape == (2, 4, 5, 8)
        assert layer.pending.shape == (2, 4, 5, 8)
        bare = regard.cache.nbytes([layer.keys, layer.values, layer.slots])
        assert regard.cache.nbytes(layer) - bare == 4 * 2 * 4 * (5 + 5) * 8
        assert regard.cache.nbytes(cache) > 3 * 4 * 2 * (2 * 2 * 45 * 8)
        layer.reset()
        assert layer.chunk_key is None


@torch.no_grad()
def test_windowed_layers_keep_their_window() -> None:
    model = tiny("gemma3")
    with regard.apply(model, LongHeads(**SMALL)):
        cache = model(ids(40)).past_key_values
    assert [isinstance(layer, ChunkedLayer) for layer in cache.layers] == [False, True, False]
    with (
        pytest.raises(Unsupported, match="layers with full context"),
        regard.apply(tiny("mistral-sliding"), LongHeads(**SMALL)),
    ):
        pass


@torch.no_grad()
def test_only_the_layers_asked_for() -> None:
    model, x = tiny("llama"), ids(60)
    with regard.apply(model, LongHeads(**SMALL, layers=[1])):
        cache = model(x).past_key_values
    assert [isinstance(layer, ChunkedLayer) for layer in cache.layers] == [False, True, False]


@torch.no_grad()
def test_refuses_padding_and_other_masks() -> None:
    model, x = tiny("llama"), ids(40)
    padding = torch.ones_like(x)
    padding[0, :3] = 0
    with regard.apply(model, LongHeads(**SMALL)), pytest.raises(Unsupported, match="padded"):
        model(x, attention_mask=padding)
    with (
        regard.apply(model, [PowerAttention(block_size=8), LongHeads(**SMALL)]),
        pytest.raises(Unsupported, match="plain causal mask"),
    ):
        model(x)


def test_refuses_rotary_it_cannot_move() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with (
        pytest.raises(Unsupported, match="longheads re-assigns rotary positions"),
        regard.apply(tiny("llama", rope_parameters=rope), LongHeads(**SMALL)),
    ):
        pass
