"""MoA on models: against a simulation token by token, what it holds, and the stages that lead to a plan."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import regard
from regard.cache import SpanLayer, nbytes
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.methods import create, parse
from regard.methods.language.moa import (
    MoA,
    MoAPlan,
    Sample,
    calibrate,
    profile_influence,
    search_plans,
    validate,
)
from regard.probes import Recorder
from tests.methods.naive_llama import NaiveLlama
from tests.tiny_models import NAMES, tiny

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
#: spans of 40 tokens: equal in the first layer, different in the second, everything in the third
PLAN = MoAPlan([[8, 4], [0, 12], [40, 0]], [[0, 0.1], [0.5, 0], [0, 1.0]], block_size=2)
SPANS = [[8, 8], [20, 12], [40, 40]]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def feed(model, ids, cuts):
    """Logits of the tokens fed in pieces that end at `cuts`, and the cache."""
    cache, out = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            out.append(model(ids[:, start:stop], past_key_values=cache).logits)
    return torch.cat(out, dim=1), cache


@pytest.mark.parametrize("name", NAMES)
def test_spans_over_everything_are_dense(name):
    model = tiny(name)
    expected, _ = feed(model, IDS, [])
    with regard.apply(model, MoA(density=1.0, length=40)):
        got, _ = feed(model, IDS, [9, 15, 16, 17, 18])
    torch.testing.assert_close(got, expected, **CLOSE)


def test_equals_a_simulation():
    """Single tokens: before each of them a head holds its sink and what its window still covers."""
    model = tiny("llama")
    tokens = IDS[0].tolist()

    def drop(layer, heads, new):
        for entries, span in zip(heads, SPANS[layer], strict=True):
            if len(entries) > span - 1:
                entries[:] = entries[:2] + entries[len(entries) - (span - 3) :]

    naive = NaiveLlama(model, drop)
    expected = torch.cat([naive([token]) for token in tokens])
    with regard.apply(model, MoA(plan=PLAN, length=40)):
        got, _ = feed(model, IDS[:1], list(range(1, 40)))
    torch.testing.assert_close(got[0], expected, **CLOSE)


@pytest.mark.parametrize(
    "cuts",
    [[], [20, *range(21, 40)], [7, 19, 20, 33, 34], [1, 2, 3, 20, 21]],
    ids=["prompt", "decode", "pieces", "few"],
)
def test_pieces_continue_what_one_forward_gives(cuts):
    model = tiny("llama")
    with regard.apply(model, MoA(plan=PLAN, length=40)):
        with torch.no_grad():
            expected = model(IDS, use_cache=False).logits
        got, cache = feed(model, IDS, cuts)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (expected - feed(model, IDS, [])[0]).abs().max() > 0.1
    per_head = 2 * 8 * 4 + 4  # key and value of 8 floats, one int32 position
    held = [layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers]
    assert held == [sum(spans) for spans in SPANS]
    if cuts:  # a layer that never dropped anything shares its positions among the heads and, read at once, the rows
        assert nbytes(cache) == 2 * (per_head * sum(held[:2]) + (per_head - 4) * held[2] + 4 * 40)
    assert cache.layers[2].counts is None
    assert [layer.counts for layer in cache.layers[:2]] == SPANS[:2]


def test_the_prompt_mask_is_the_windows():
    """Weights under the method are the model's own inside the spans, and nothing outside."""
    model = tiny("llama", attn_implementation="eager")
    with regard.apply(model, MoA(plan=PLAN)), torch.no_grad():
        weights = model(IDS, output_attentions=True, use_cache=False).attentions
    q, k = torch.arange(40)[:, None], torch.arange(40)
    for layer, spans in enumerate(SPANS):
        for head in range(4):
            seen = (k <= q) & ((k < 2) | (q - k < spans[head // 2] - 2))
            assert torch.equal(weights[layer][0, head] > 0, seen)


def test_spans_follow_the_prompt_and_what_is_to_come():
    model = tiny("llama")
    for method, length in ((MoA(plan=PLAN), 20), (MoA(plan=PLAN, max_new=20), 40), (MoA(plan=PLAN, length=30), 30)):
        with regard.apply(model, method):
            _, cache = feed(model, IDS[:, :20], [])
        assert [layer.spans for layer in cache.layers] == PLAN.spans(length).tolist()


def test_survives_beams_and_copies():
    model = tiny("llama")
    given = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(IDS)}
    with regard.apply(model, MoA(plan=PLAN, length=40)):
        expected = model.generate(IDS, use_cache=False, **given)
        assert torch.equal(model.generate(IDS, **given), expected)
        _, cache = feed(model, IDS, [])
        twin = copy.deepcopy(cache)
        with torch.no_grad():
            first, second = (model(IDS[:, :3], past_key_values=c).logits for c in (cache, twin))
        assert torch.equal(first, second)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_layers_that_slide_are_left_alone():
    model = tiny("gemma3")
    plan = MoAPlan.uniform(3, 1, alpha=8, block_size=2)
    with regard.apply(model, MoA(plan=plan)):
        _, cache = feed(model, IDS, [20])
    assert [isinstance(layer, SpanLayer) for layer in cache.layers] == [False, True, False]
    assert cache.layers[1].counts == [8]


def test_composes_with_a_recording():
    model = tiny("llama")
    recorder = Recorder()
    with regard.apply(model, [MoA(plan=PLAN), recorder]), torch.no_grad():
        model(IDS, use_cache=False)
    mass = recorder.recording.layers[0].mass
    torch.testing.assert_close(mass.sum(-1), torch.full_like(mass.sum(-1), 40.0))
    assert mass[0, 0, 30] < mass[0, 0, 0]


def test_refuses():
    model = tiny("llama")
    padding = torch.ones_like(IDS)
    padding[0, :3] = 0
    with regard.apply(model, MoA(plan=PLAN)):
        with pytest.raises(Unsupported, match="without padding"):
            model(IDS, attention_mask=padding)
        with pytest.raises(Unsupported, match="plain causal mask"):
            model(IDS, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool).tril())
    with (
        pytest.raises(ArgumentError, match="3 layers of 2 key-value heads"),
        regard.apply(model, MoA(plan=MoAPlan.uniform(3, 4))),
    ):
        pass
    for arguments in ({"density": 0}, {"density": 1.5}, {"max_new": -1}, {"length": 0}, {"block_size": 0}, {"plan": 3}):
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            MoA(**arguments)
    with pytest.raises(ArgumentError, match="exceed their sinks"):
        SpanLayer().set_spans([4], [4])
    with pytest.raises(ArgumentError, match="cannot keep equally many"):
        SpanLayer().keep(torch.zeros(1, 1, 1, dtype=torch.long))


def test_is_made_from_a_line_of_text(tmp_path):
    PLAN.to_json(tmp_path / "plan.json")
    (method,) = parse(f"moa(plan={str(tmp_path / 'plan.json')!r}, max_new=4)")
    model = tiny("llama")
    with regard.apply(model, method):
        got, _ = feed(model, IDS, [])
    with regard.apply(model, create("moa", plan=PLAN, length=44)):
        expected, _ = feed(model, IDS, [])
    assert torch.equal(got, expected)


# --- stages ---------------------------------------------------------------------------------------------------------


def samples(model, count=2):
    prompts = torch.randint(3, 97, (count, 20), generator=torch.Generator().manual_seed(5)).tolist()
    return calibrate(model, prompts, 13)


def answer_loss(logits, sample):
    return F.cross_entropy(logits[sample.answer[1:]], sample.tokens[1:][sample.answer[1:]])


def test_calibration_is_the_models_own_answer():
    model = tiny("llama")
    seen = []
    (first, _) = found = samples(model)
    assert [sample.length for sample in found] == [32, 32]
    assert first.answer.tolist() == [False] * 20 + [True] * 13
    with torch.no_grad():
        greedy = model(first.tokens[None, :-1]).logits[0].argmax(-1)
    own = [t for t, p in zip(first.tokens[20:].tolist(), greedy[19:].tolist(), strict=True) if t == p]
    assert len(own) >= 12  # all but where a token that ends the text was not allowed
    calibrate(model, [[3, 4]], 1, on_progress=lambda *step: seen.append(step))
    assert seen == [(1, 1)]


def test_profile_is_the_gradient_of_the_weights():
    """Against autograd through the model's own eager attention, weight by weight."""
    model = tiny("llama", attn_implementation="eager").double()
    chosen = samples(model)
    want = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
    for sample in chosen:
        out = model(sample.tokens[None, :-1], output_attentions=True, use_cache=False)
        slopes = torch.autograd.grad(answer_loss(out.logits[0], sample), out.attentions)
        for layer, (weights, slope) in enumerate(zip(out.attentions, slopes, strict=True)):
            a, s = weights[0].detach(), slope[0]
            effect = (a * (s - (a * s).sum(-1, keepdim=True)) / (1 - a + 2.2e-16)).abs()
            effect[:, 0] = (a * s).abs()[:, 0]
            want[layer] += effect.unflatten(2, (4, 8)).sum(3).unflatten(1, (4, 8)).sum(2) / len(chosen)
    seen = []
    got = profile_influence(model, chosen, block_size=8, on_progress=lambda *step: seen.append(step))
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-5)
    assert seen == [(1, 2), (2, 2)]
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen = copy.deepcopy(model).requires_grad_(False)
    torch.testing.assert_close(profile_influence(frozen, chosen, block_size=8), got)


def test_plans_keep_the_density_and_validation_reads_them():
    model = tiny("llama")
    chosen = samples(model)
    influence = {32: profile_influence(model, chosen, block_size=4)}
    plans = search_plans(influence, 0.5, num_kv_heads=2, other_lengths=[64], interval=16, block_size=4)
    assert plans
    for plan in plans:
        assert plan.shape == (3, 2)
        assert all(plan.density(n) <= 0.5 for n in (32, 64))
    seen = []
    full = MoAPlan.uniform(3, 2, beta=1.0)
    dense, own, everything = validate(
        model, [None, plans[0], full], chosen, on_progress=lambda *step: seen.append(step)
    ).tolist()
    with torch.no_grad():
        want = [answer_loss(model(s.tokens[None, :-1]).logits[0], s).item() for s in chosen]
    assert dense == pytest.approx(sum(want) / 2, rel=1e-4)
    assert everything == pytest.approx(dense, rel=1e-4)
    assert own != pytest.approx(dense, rel=1e-4)
    assert seen[-1] == (6, 6)


def test_stages_refuse():
    model = tiny("llama")
    tokens, answer = torch.arange(9), torch.ones(9, dtype=torch.bool)
    with pytest.raises(ShapeError, match="same shape in bool"):
        Sample(tokens, answer[:3])
    with pytest.raises(ArgumentError, match="without a token of the answer"):
        Sample(tokens, ~answer)
    with pytest.raises(ArgumentError, match="new_tokens"):
        calibrate(model, [[3]], 0)
    with pytest.raises(ArgumentError, match="one length"):
        profile_influence(model, [Sample(tokens, answer), Sample(tokens[:5], answer[:5])])
    with pytest.raises(ArgumentError, match="multiple of block_size=3"):
        profile_influence(model, [Sample(tokens, answer)], block_size=3)
    with pytest.raises(Unsupported, match="not plainly causal"):
        profile_influence(tiny("gemma3"), [Sample(torch.arange(17), torch.ones(17, dtype=torch.bool))], block_size=8)
    with pytest.raises(ArgumentError, match="at least one length"):
        search_plans({}, 0.5)
    with pytest.raises(ArgumentError, match="density"):
        search_plans({64: torch.zeros(1, 1, 1, 1)}, 0)
    with pytest.raises(ArgumentError, match="must not be empty"):
        validate(model, [], [Sample(tokens, answer)])
