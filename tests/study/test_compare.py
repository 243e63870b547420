"""`compare` measures what it says, on small models whose numbers can be checked."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import regard
from regard.errors import ArgumentError, Unsupported
from regard.methods import create
from regard.sites import Method
from regard.study import default_methods
from regard.tasks import english, tokenize
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

CONTEXT, CONTINUATION = 120, 12
SMALL = {"context": CONTEXT, "continuation": CONTINUATION, "generate": 10, "passkeys": 1}


def small(name="llama", **changes):
    return tiny(name, vocab_size=VOCAB_SIZE, **changes), tiny_tokenizer()


def compare(methods, model=None, **changes):
    return regard.compare(small() if model is None else model, methods, **{**SMALL, **changes})


@dataclass(kw_only=True)
class Nothing(Method):
    """Sends attention through regard and changes nothing."""

    name: ClassVar[str] = "nothing"
    note: str = ""

    def after(self, call):
        pass


@dataclass(kw_only=True)
class Picky(Method):
    """Refuses prompts longer than `at` tokens."""

    name: ClassVar[str] = "picky"
    at: int = 0

    def qkv(self, call):
        if call.query.shape[2] > self.at:
            raise Unsupported(f"more than {self.at} tokens")


def own_loss(model, tokenizer):
    """transformers' own loss on the continuation, in one forward."""
    ids = torch.tensor([tokenize(tokenizer, english(), CONTEXT + CONTINUATION)])
    labels = ids.clone()
    labels[:, :CONTEXT] = -100
    with torch.no_grad():
        return model(ids, labels=labels).loss.item()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_dense_loss_is_transformers_own(name):
    model, tokenizer = small(name)
    dense = compare([], (model, tokenizer)).dense
    assert dense.loss == pytest.approx(own_loss(model, tokenizer), rel=1e-5)
    assert dense.perplexity == pytest.approx(math.exp(dense.loss))


def test_dense_row():
    result = compare([])
    dense = result.dense
    assert result.results == [dense]
    # 3 layers, keys and values, 2 heads of 8 channels in float32
    assert dense.cache_bytes == CONTEXT * 3 * 2 * 2 * 8 * 4
    assert dense.agreement == 1
    assert dense.perplexity_change == 0
    assert dense.prefill_ratio == dense.decode_ratio == 1
    assert dense.prefill_seconds > 0
    assert dense.peak_bytes > 0
    assert [recall.correct for recall in dense.recalls] == [False]  # random weights
    assert [picture.layer for picture in dense.pictures] == [0, 1, 2]


@pytest.mark.parametrize("method", [Nothing(), "h2o(budget=1.0)", "sliding-window(window_size=1000)"])
def test_what_drops_nothing_equals_dense(method):
    dense, other = compare([method]).results
    assert other.error is None
    assert other.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert other.perplexity_change == other.perplexity - dense.perplexity
    assert other.agreement == 1
    for a, b in zip(dense.pictures, other.pictures, strict=True):
        torch.testing.assert_close(torch.tensor(a.prompt), torch.tensor(b.prompt), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(torch.tensor(a.decoded), torch.tensor(b.decoded), atol=1e-4, rtol=1e-3)


def test_a_window_changes_the_model_and_what_is_dropped_is_gone():
    window, dropped = compare("sliding-window(window_size=8), streaming-llm(recent_size=20)").results[1:]
    assert abs(window.perplexity_change) > 0.01
    assert abs(dropped.perplexity_change) > 0.01
    dense_bytes = CONTEXT * 3 * 2 * 2 * 8 * 4
    assert window.cache_bytes == dense_bytes
    assert dropped.cache_bytes < 0.3 * dense_bytes


def test_pictures_are_distributions_and_show_what_was_dropped():
    (picture, *_) = compare("streaming-llm(start_size=4, recent_size=20)").results[1].pictures
    assert picture.edges[0] == 0
    assert picture.edges[-1] == CONTEXT
    assert len(picture.decoded) == len(picture.tokens)
    for row in picture.prompt + picture.decoded:
        assert sum(row) == pytest.approx(1, abs=1e-4)
    first = picture.decoded[0]
    assert max(first[4 // 2 + 1 : 40]) == 0  # between the sinks and the window
    assert first[0] > 0
    assert first[-1] > 0  # itself


def test_without_passkeys_the_text_is_pictured():
    comparison = compare(["sliding-window"], passkeys=0)
    for result in comparison.results:
        assert result.recalls == []
        assert "".join(result.pictures[0].tokens)
        assert result.pictures[0].target is None
    comparison.table()


def test_the_text_is_read_from_the_given_source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(english(), encoding="utf-8")
    default, file, given = (compare([], text=text).dense for text in (None, path, english()))
    assert default.perplexity == file.perplexity == given.perplexity
    assert compare([], text=english()[5000:]).dense.perplexity != default.perplexity


def test_the_tokenizers_own_opening_comes_first():
    model, _ = small()
    plain, opened = (compare([], (model, tiny_tokenizer(bos))).dense.perplexity for bos in (False, True))
    assert plain != opened


def test_times_are_taken_as_often_as_asked():
    comparison = compare([Nothing(), Nothing()], repeats=3)
    assert len(comparison.clock.prefill_seconds) == len(comparison.clock.decode_seconds) == 1 + 2 * 3
    for result in comparison.results[1:]:
        assert result.prefill_ratio > 0
        assert result.decode_ratio > 0


def test_progress_only_grows_and_arrives():
    steps = []
    compare([Nothing(), Picky()], on_progress=steps.append)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert {step.method for step in steps} == {"dense", "nothing"}  # picky is out before it starts
    assert done[-1] <= steps[-1].total
    steps.clear()
    compare([Nothing()], on_progress=steps.append)
    assert steps[-1].done == steps[-1].total


@pytest.mark.parametrize("at", [0, CONTEXT - 1])
def test_a_method_that_cannot_run_is_said_so(at):
    dense, picky, nothing = compare([Picky(at=at), Nothing()]).results
    assert picky.error == f"more than {at} tokens"
    assert picky.perplexity is None
    assert dense.perplexity == pytest.approx(nothing.perplexity, rel=1e-4)


def test_the_model_is_left_as_it_was():
    model, tokenizer = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    compare("h2o", (model, tokenizer))
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_leading_settings_are_shown_even_if_they_are_defaults():
    asked = "h2o, h2o(hh_size=9, recent_size=8), streaming-llm(recent_size=30), h2o(normalise=True)"
    assert [result.method for result in compare(asked).results] == [
        "dense",
        "h2o(budget=0.25)",
        "h2o(hh_size=9, recent_size=8)",
        "streaming-llm(start_size=4, recent_size=30)",
        "h2o(normalise=True)",
    ]


def test_default_methods_leave_a_quarter():
    names = [method.name for method in default_methods(2048)]
    assert names == ["sliding-window", "streaming-llm", "h2o", "xkv", "power-attention", "longheads", "dhsa"]
    assert default_methods(2048)[0] == create("sliding-window", window_size=512)
    assert all(isinstance(method, Method) for method in default_methods(64))


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ("h3o", {}, "unknown method 'h3o'; did you mean h2o"),
        ("h2o(share=0.2)", {}, "h2o has no argument 'share'"),
        ([7], {}, "methods must be methods or their names, got int: 7"),
        ([], {"context": 0}, "context must be at least 1, got 0"),
        ([], {"continuation": 0}, "continuation must be at least 1, got 0"),
        ([], {"generate": 1}, "generate must be at least 2, got 1"),
        ([], {"passkeys": -1}, "passkeys must be at least 0, got -1"),
        ([], {"repeats": 0}, "repeats must be at least 1, got 0"),
        ([], {"context": 500}, "take 564 tokens, but the model reads at most 512"),
        ([], {"context": 500, "passkeys": 0}, "take 517 tokens, but the model reads at most 512"),
        ([], {"passkeys": 12}, "context of 120 tokens is too short for 12 passkeys"),
        ([], {"text": "Just this."}, r"text has \d+ tokens, expected at least 132, context 120 \+ continuation 12"),
        ([], {"text": " \n"}, "text is empty"),
    ],
)
def test_refusals(methods, changes, message):
    with pytest.raises(ArgumentError, match=message):
        compare(methods, **changes)


def test_a_model_needs_its_tokenizer():
    model, tokenizer = small()
    for given in (model, (tokenizer, model), [model, tokenizer]):
        with pytest.raises(ArgumentError, match=r"model must be a name, a path or \(model, tokenizer\), got"):
            compare([], given)


def test_models_that_cannot_be_adapted_are_refused():
    model, tokenizer = small()
    for layer in model.model.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(Unsupported, match="no attention module found"):
        compare([], (model, tokenizer))


def test_smollm2_reads_and_recalls(smollm2):
    """One real model, at a length where it recalls what it has read."""
    comparison = regard.compare(
        smollm2, "streaming-llm(recent_size=60)", context=320, continuation=24, passkeys=2, generate=8
    )
    dense, dropped = comparison.results
    assert dense.recalled == 2
    assert not dropped.recalls[0].correct  # it stood before the window
    assert dropped.recalls[0].depth < 1 - 64 / 320
    assert dense.perplexity < 60
    assert dropped.perplexity > dense.perplexity
    model, tokenizer = smollm2
    ids = torch.tensor([tokenize(tokenizer, english(), 320 + 24)])
    labels = ids.clone()
    labels[:, :320] = -100
    with torch.no_grad():
        assert dense.loss == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-4)
