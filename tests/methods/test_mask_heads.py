"""Masked heads against models whose weights say the same: no query rows, no output columns, or means by hand."""

import copy

import pytest
import torch

import regard
from regard.errors import ArgumentError
from regard.methods import registry
from regard.methods.language.mask_heads import MaskHeads, mask_heads
from regard.probes import Recorder
from tests.tiny_models import NAMES, tiny

TARGETS = [(0, 1), (0, 2), (2, 3)]


def tokens(batch=1, length=21, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def attention_of(model, layer):
    names = (f"model.layers.{layer}.self_attn", f"gpt_neox.layers.{layer}.attention")
    return next(module for name, module in model.named_modules() if name in names)


@torch.no_grad()
def without(model, part):
    """A copy whose weights leave out the queries or the outputs of TARGETS."""
    model = copy.deepcopy(model)
    for layer, head in TARGETS:
        attention = attention_of(model, layer)
        if part == "outputs":
            projection = getattr(attention, "o_proj", None) or attention.dense
            dim = projection.in_features // 4
            projection.weight[:, head * dim : (head + 1) * dim] = 0
            continue
        if hasattr(attention, "query_key_value"):  # each head's query, key and value in turn
            projection, first = attention.query_key_value, head * 3 * attention.head_size
            rows = slice(first, first + attention.head_size)
        else:
            projection = getattr(attention, "q_proj", None) or attention.qkv_proj
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        projection.weight[rows] = 0
        if projection.bias is not None:
            projection.bias[rows] = 0
    return model


@pytest.mark.parametrize("name", [*NAMES, "mistral-sliding"])
@pytest.mark.parametrize(("mode", "part"), [("uniform_causal", "queries"), ("zero_output", "outputs")])
@torch.no_grad()
def test_equals_the_model_without_the_weights(name, mode, part) -> None:
    model, ids = tiny(name), tokens(2)
    padding = torch.ones_like(ids)
    padding[1, :6] = 0
    given = {"input_ids": ids, "attention_mask": padding}
    want = without(model, part)(**given).logits
    with regard.apply(model, MaskHeads(targets=TARGETS, mode=mode)):
        got = model(**given).logits
        beams = model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)
    keep = padding.bool()
    torch.testing.assert_close(got[keep], want[keep], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(want[keep], model(**given).logits[keep], atol=1e-2)
    expected = without(model, part).generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(beams, expected)


@torch.no_grad()
def test_biases_of_the_query_projection_go_too() -> None:
    model, ids = tiny("llama", attention_bias=True), tokens()
    for layer in range(3):
        attention_of(model, layer).q_proj.bias.normal_(0, 3, generator=torch.Generator().manual_seed(layer))
    want = without(model, "queries")(ids).logits
    with mask_heads(model, TARGETS):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mode", "part"), [("uniform_causal", "queries"), ("zero_output", "outputs")])
@torch.no_grad()
def test_decoding_only_leaves_the_prompt(mode, part) -> None:
    model, ids = tiny("llama"), tokens()
    changed = without(model, part)
    cache = model(ids[:, :-3], use_cache=True).past_key_values
    want = [changed(ids[:, i : i + 1], past_key_values=cache).logits for i in range(18, 21)]
    with regard.apply(model, MaskHeads(targets=TARGETS, mode=mode, decoding_only=True)):
        read = model(ids[:, :-3], use_cache=True)
        got = [model(ids[:, i : i + 1], past_key_values=read.past_key_values).logits for i in range(18, 21)]
    torch.testing.assert_close(read.logits, model(ids[:, :-3]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def head_outputs(model, given, methods):
    """(B, N, H, D) head outputs of layer 0, and its values (B, N, Hk, D)."""
    seen = {}
    attention = attention_of(model, 0)
    handles = [
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0])),
        attention.v_proj.register_forward_hook(lambda _, args, out: seen.update(value=out)),
    ]
    with torch.no_grad(), regard.apply(model, methods):
        model(**given)
    for handle in handles:
        handle.remove()
    return seen["out"].unflatten(-1, (4, -1)), seen["value"].unflatten(-1, (2, -1))


def test_uniform_all_sees_the_whole_prompt() -> None:
    model, ids = tiny("llama"), tokens(2, 13)
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    given = {"input_ids": ids, "attention_mask": padding}
    out, value = head_outputs(model, given, MaskHeads(targets=TARGETS, mode="uniform_all"))
    before, _ = head_outputs(model, given, [])
    for head in (1, 2):  # grouped: two query heads share values
        for item, first in ((0, 0), (1, 5)):
            mean = value[item, first:, head // 2].mean(0)
            torch.testing.assert_close(out[item, :, head], mean.expand(13, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, 5:, [0, 3]], before[:, 5:, [0, 3]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["uniform_causal", "uniform_all"])
def test_a_bias_hides_but_does_not_choose(mode) -> None:
    model, ids, n = tiny("llama"), tokens(), 21
    bias = torch.randn(1, 1, n, n, generator=torch.Generator().manual_seed(0)) * 3
    bias = bias.masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(torch.float32).min)
    out, value = head_outputs(model, {"input_ids": ids, "attention_mask": bias}, MaskHeads(targets=TARGETS, mode=mode))
    for t in (0, 7, 20):
        seen = value[0, : t + 1, 0] if mode == "uniform_causal" else value[0, :, 0]
        torch.testing.assert_close(out[0, t, 1], seen.mean(0), atol=1e-5, rtol=1e-4)


def test_probes_see_the_uniform_weights() -> None:
    model, ids = tiny("llama"), tokens()
    recorder = Recorder(queries=[9])
    with torch.no_grad(), regard.apply(model, [MaskHeads(targets=TARGETS), recorder]):
        model(ids)
    row = recorder.recording.layers[2].rows[0, 3, 0]
    torch.testing.assert_close(row[:10], torch.full((10,), 0.1))
    assert not row[10:].any()


@torch.no_grad()
def test_no_target_changes_nothing() -> None:
    model, ids = tiny("llama"), tokens()
    want = model(ids).logits
    with regard.apply(model, MaskHeads()):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    with regard.apply(model, MaskHeads(targets=TARGETS, layers=[1])):  # layer 1 has no target
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


def test_by_name_and_refusals() -> None:
    (parsed,) = registry.parse("mask-heads(targets=[(0, 1)], mode='zero_output')")
    assert parsed == MaskHeads(targets=[(0, 1)], mode="zero_output")
    with pytest.raises(ArgumentError, match="mode must be one of uniform_causal, uniform_all, zero_output, got 'none'"):
        MaskHeads(mode="none")  # type: ignore[arg-type]
    for wrong in ([(0, -1)], [(0, 1, 2)], [3]):
        with pytest.raises(ArgumentError, match=r"targets: expected pairs"):
            MaskHeads(targets=wrong)  # type: ignore[arg-type]
    model = tiny("llama")
    with (
        pytest.raises(ArgumentError, match=r"targets: the model has layers 0\.\.2, got \(3, 0\)"),
        regard.apply(model, MaskHeads(targets=[(3, 0)])),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match=r"targets: layer 0 has heads 0\.\.3, got \(0, 4\)"),
        regard.apply(model, MaskHeads(targets=[(0, 4)])),
    ):
        pass
