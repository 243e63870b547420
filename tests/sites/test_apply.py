"""regard.apply on transformers: exact restoration, every stage, every family, generation in all its forms."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import regard
from regard import masks
from regard.errors import ArgumentError, Unsupported
from regard.sites import Call, Method, find_sites
from regard.sites.stages import Stages
from tests.tiny_models import NAMES, tiny

ALL = [*NAMES, "mistral-sliding"]


@dataclass(kw_only=True)
class Watch(Method):
    """Runs attention through regard without changing anything."""

    name: ClassVar[str] = "watch"
    needs_lse: ClassVar[bool] = True

    def __post_init__(self):
        self.calls = []

    def after(self, call: Call):
        self.calls.append((call.site.index, tuple(call.query.shape), tuple(call.key.shape), tuple(call.lse.shape)))


@dataclass(kw_only=True)
class Window(Method):
    name: ClassVar[str] = "window"
    size: int = 5

    def mask(self, call):
        return masks.sliding_window(self.size).shift(call.past)


def tokens(batch=2, length=33, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch=2, length=20, pad=7):
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    ids[0, :pad] = 0
    return ids, mask


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def fingerprint(model):
    """Everything `apply` could leave behind: parameters, hooks, and the attention implementation."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs), "forward" in vars(m))
        for m in model.modules()
    ]
    return hooks, model.config._attn_implementation, {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    assert a[:2] == b[:2]
    assert a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][k], b[2][k]) for k in a[2])


@pytest.mark.parametrize("name", ALL)
def test_no_method_changes_nothing(name):
    model, ids = tiny(name), tokens()
    before = logits(model, ids)
    with regard.apply(model, []):
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_watching_is_harmless_and_leaves_no_trace(name, implementation):
    model, ids = tiny(name, attn_implementation=implementation), tokens()
    before, was = logits(model, ids), fingerprint(model)
    with regard.apply(model, Watch()) as applied:
        torch.testing.assert_close(logits(applied, ids), before, atol=2e-5, rtol=1e-4)
        assert model.config._attn_implementation == "regard"
    same(fingerprint(model), was)
    assert torch.equal(logits(model, ids), before)


def test_everything_is_undone_when_the_block_raises():
    model, ids = tiny("llama"), tokens()
    before, was = logits(model, ids), fingerprint(model)

    def interrupted():
        with regard.apply(model, Watch()):
            logits(model, ids)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        interrupted()
    same(fingerprint(model), was)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["greedy", "sample", "beam"],
)
def test_generation_is_unchanged(name, how):
    model = tiny(name)
    ids, mask = left_padded()

    def generate():
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, **how)

    expected = generate()
    with regard.apply(model, Watch()):
        assert torch.equal(generate(), expected)


@pytest.mark.parametrize("name", ALL)
def test_left_padding_and_chunked_prefill(name):
    model = tiny(name)
    ids, mask = left_padded()
    real = mask.bool()
    before = logits(model, ids, attention_mask=mask)
    with regard.apply(model, Watch()):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask)[real], before[real], atol=2e-5, rtol=1e-4)
        with torch.no_grad():
            first = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
            second = model(ids[:, 11:], attention_mask=mask, past_key_values=first.past_key_values)
        together = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(together[real], before[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_mask_stage_equals_a_four_dimensional_mask(name):
    model, ids = tiny(name, attn_implementation="eager"), tokens(1, 31)
    n = ids.shape[1]
    i = torch.arange(n)
    near = (i[:, None] - i[None, :] < 5) & (i[:, None] >= i[None, :])
    additive = torch.zeros(1, 1, n, n).masked_fill(~near, torch.finfo(torch.float32).min)
    layered = {"full_attention": additive, "sliding_attention": additive} if name == "gemma3" else additive
    expected = logits(model, ids, attention_mask=layered)
    with regard.apply(model, Window(size=5)):
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)


def test_decoding_under_a_mask_equals_prefill_under_it():
    model, ids = tiny("llama"), tokens(1, 24)
    with regard.apply(model, Window(size=6)), torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :9], use_cache=True)
        pieces = [out.logits]
        for t in range(9, 24):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)


def test_user_given_four_dimensional_masks_are_honoured():
    model, ids = tiny("llama", attn_implementation="eager"), tokens(1, 17)
    allowed = torch.rand(1, 1, 17, 17, generator=torch.Generator().manual_seed(0)) < 0.4
    allowed |= torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = logits(model, ids, attention_mask=additive)
    with regard.apply(model, Watch()):
        torch.testing.assert_close(logits(model, ids, attention_mask=additive), expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(logits(model, ids, attention_mask=allowed), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_stages_see_the_documented_shapes(name):
    seen = {}

    @dataclass(kw_only=True)
    class Spy(Method):
        def hidden(self, site, hidden_states):
            seen["hidden"] = hidden_states.shape
            return hidden_states

        def qkv(self, call):
            seen["qkv"] = call.query.shape, call.key.shape, call.value.shape
            assert call.step.positions.shape[-1] == call.query.shape[2]
            assert call.step.cos.shape[-2] == call.query.shape[2]

        def scores(self, call, scores):
            seen["scores"] = scores.shape
            return scores

        def weights(self, call, weights):
            seen["weights"] = weights.shape
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            return weights

        def heads(self, call, out):
            seen["heads"] = out.shape
            return out

        def output(self, site, hidden_states):
            seen["output"] = hidden_states.shape
            return hidden_states

        def logits(self, logits):
            seen["logits"] = logits.shape
            return logits

    model, ids = tiny(name), tokens(2, 13)
    heads, kv = 4, getattr(model.config, "num_key_value_heads", 4)
    before = logits(model, ids)
    with regard.apply(model, Spy()):
        torch.testing.assert_close(logits(model, ids), before, atol=2e-5, rtol=1e-4)
    assert seen == {
        "hidden": (2, 13, 32),
        "qkv": ((2, heads, 13, 8), (2, kv, 13, 8), (2, kv, 13, 8)),
        "scores": (2, heads, 13, 13),
        "weights": (2, heads, 13, 13),
        "heads": (2, heads, 13, 8),
        "output": (2, 13, 32),
        "logits": (2, 13, 97),
    }


def test_stages_change_what_they_say():
    model, ids = tiny("llama"), tokens(1, 12)
    plain = logits(model, ids)

    @dataclass(kw_only=True)
    class NoHead(Method):
        def heads(self, call, out):
            return out * torch.tensor([1.0, 0, 1, 1])[:, None, None]

    @dataclass(kw_only=True)
    class NoHeadByWeights(Method):
        def weights(self, call, weights):
            return weights * torch.tensor([1.0, 0, 1, 1])[:, None, None]

    @dataclass(kw_only=True)
    class Double(Method):
        def logits(self, logits):
            return 2 * logits

    with torch.no_grad():
        column = model.model.layers[1].self_attn.o_proj.weight[:, 8:16].clone()
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
        expected = logits(model, ids)
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = column
    for method in (NoHead(layers=[1]), NoHeadByWeights(layers=[1])):
        with regard.apply(model, method):
            torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    with regard.apply(model, [NoHead(layers=[1]), Double()]):
        torch.testing.assert_close(logits(model, ids), 2 * expected, atol=5e-5, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_methods_compose_in_order():
    model, ids = tiny("llama"), tokens(1, 20)
    with regard.apply(model, [Window(size=7), Window(size=4)]):
        both = logits(model, ids)
    with regard.apply(model, Window(size=4)):
        torch.testing.assert_close(logits(model, ids), both)


def test_weights_exist_only_for_methods_that_ask(monkeypatch):
    model, ids = tiny("llama"), tokens(1, 20)

    def refuse(*_):
        raise AssertionError("weights were materialised")

    monkeypatch.setattr(Stages, "_materialised", refuse)
    with regard.apply(model, [Watch(), Window(size=4)]):
        logits(model, ids)


def test_probe_columns_are_mixed_with_the_same_weights():
    model, ids = tiny("llama"), tokens(1, 15)
    model_eager = tiny("llama", attn_implementation="eager")
    with torch.no_grad():
        expected = model_eager(ids, output_attentions=True).attentions
    rows = []

    @dataclass(kw_only=True)
    class Probe(Method):
        def qkv(self, call):
            call.probe = torch.eye(call.key.shape[2])[None, None]

        def after(self, call):
            rows.append(call.extra["probe"])

    before = logits(model, ids)
    with regard.apply(model, Probe()):
        torch.testing.assert_close(logits(model, ids), before, atol=2e-5, rtol=1e-4)
    for got, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_output_attentions_are_given_when_asked_for():
    model, ids = tiny("llama", attn_implementation="eager"), tokens(1, 15)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        with regard.apply(model, Watch(layers=[])):
            got = model(ids, output_attentions=True).attentions
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_an_applied_model():
    model, ids = tiny("llama"), tokens(1, 15)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    with regard.apply(model, Watch()):
        for a, b in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


class TestErrors:
    def test_not_a_method(self):
        with (
            pytest.raises(ArgumentError, match="methods must be regard methods, got str"),
            regard.apply(tiny("llama"), ["h2o"]),
        ):
            pass

    def test_two_methods_that_replace_attention(self):
        @dataclass(kw_only=True)
        class Replace(Method):
            name: ClassVar[str] = "replace"

            def attend(self, call):
                return call.query

        with (
            pytest.raises(ArgumentError, match="only one method may provide 'attend'"),
            regard.apply(tiny("llama"), [Replace(), Replace()]),
        ):
            pass

    def test_applying_twice(self):
        model = tiny("llama")
        again = regard.apply(model, Watch())
        with regard.apply(model, Watch()), pytest.raises(ArgumentError, match="already under"):
            again.__enter__()

    def test_models_without_attention(self):
        with pytest.raises(Unsupported, match="no attention module"), regard.apply(torch.nn.Linear(2, 2), Watch()):
            pass

    def test_foreign_attention_is_named(self):
        class OwnAttention(torch.nn.Module):
            def forward(self, x):
                return x

        model = tiny("llama")
        model.model.layers[0].extra = OwnAttention()
        named = r"model\.layers\.0\.extra \(OwnAttention\)"
        with pytest.raises(Unsupported, match=named), regard.apply(model, Watch()):
            pass

    def test_dropout_is_refused(self):
        model = tiny("llama", attention_dropout=0.1).train()
        with regard.apply(model, Watch()), pytest.raises(Unsupported, match="dropout"):
            model(tokens())


def test_sites_of_a_mixed_model():
    sites = find_sites(tiny("gemma3"))
    assert [site.index for site in sites] == [0, 1, 2]
    assert [site.window for site in sites] == [12, None, 12]
    assert all(site.rotary is not None for site in sites)
    assert [site.window for site in find_sites(tiny("mistral-sliding"))] == [12, 12, 12]


@pytest.mark.parametrize("name", ALL)
def test_rotary_of_every_family_moves_positions(name):
    """The site's rotary reproduces the model's own rotation and inverts it."""
    model, ids = tiny(name), tokens(1, 9)
    checked = []

    @dataclass(kw_only=True)
    class Check(Method):
        def qkv(self, call):
            rotary, positions = call.site.need_rotary("check"), call.step.positions
            raw = rotary.unrotate(call.key, positions)
            torch.testing.assert_close(rotary.rotate(raw, positions), call.key, atol=1e-5, rtol=1e-4)
            cos, sin = rotary.angles(positions, call.key)
            torch.testing.assert_close(cos[:, None], call.step.cos)
            torch.testing.assert_close(sin[:, None], call.step.sin)
            checked.append(call.site.index)

    with regard.apply(model, Check()):
        logits(model, ids)
    assert checked == [0, 1, 2]
