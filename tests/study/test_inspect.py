"""The inspector's figures against eager attention."""

import math
from itertools import pairwise

import pytest
import torch

import regard
from regard.errors import ArgumentError
from regard.study.inspect import ROLES, inspect, role_of
from regard.tasks import english
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

TEXT = english()[10_000:11_000]
N = 90


def model(name="llama", **changes):
    return tiny(name, vocab_size=VOCAB_SIZE, attn_implementation="eager", **changes)


@pytest.fixture(scope="module")
def found():
    return inspect((model(), tiny_tokenizer()), text=TEXT, tokens=N)


@pytest.fixture(scope="module")
def weights():
    """(layers, heads + 1, N, N), the last being the mean."""
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][:N]])
    with torch.no_grad():
        every = torch.cat(model()(ids, output_attentions=True).attentions)
    return torch.cat([every, every.mean(1, keepdim=True)], 1), ids[0].tolist()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def binned(w, edges):
    parts = [w[:, a:b].mean(1) for a, b in pairwise(edges)]
    rows = torch.stack(parts, 1)
    return torch.stack([rows[..., a:b].sum(-1) for a, b in pairwise(edges)], -1)


def test_tensors_equal_eager_attention(found, weights) -> None:
    w, _ = weights
    close(found.patterns, binned(w.flatten(0, 1), found.edges))
    close(found.flow, binned(w.flatten(0, 1), found.spans))
    close(found.received, (w.sum(2) / torch.arange(N, 0, -1)).flatten(0, 1))
    top = w[:, -1].topk(found.top.shape[-1]).values
    close(found.shares, top)
    close(w[:, -1].gather(-1, found.top), top)


def test_figures_equal_eager_attention(found, weights) -> None:
    w, ids = weights
    assert [(unit.layer, unit.head) for unit in found.units] == [(i, h) for i in range(3) for h in (0, 1, 2, 3, None)]
    assert found.causal
    for unit, one in zip(found.units, w.flatten(0, 1), strict=True):
        away = sum(float(one[i, j]) * (i - j) for i in range(N) for j in range(i)) / N
        assert unit.distance == pytest.approx(away, abs=1e-3)
        assert unit.first == pytest.approx(float(one[:, 0].mean()), abs=1e-4)
        if unit.head is not None:
            assert unit.entropy == pytest.approx(float(torch.special.entr(one).sum(-1).mean()), abs=1e-4)
        again = {i: [j for j in range(1, i) if ids[j - 1] == ids[i]] for i in range(N)}
        expected = [float(one[i, keys].sum()) for i, keys in again.items() if keys]
        assert len(expected) > 5
        assert unit.repetition == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        if unit.head is None:
            assert unit.role is None
            continue
        near = sum(float(one.diagonal(-gap).sum()) for gap in range(8)) / N
        shares = {
            "itself": float(one.diagonal().mean()), "previous": float(one.diagonal(-1).sum()) / N, "near": near,
            "first": unit.first, "repetition": unit.repetition,
        }  # fmt: skip
        highest = sum(math.log(i + 1) for i in range(N)) / N
        assert unit.role == role_of(shares, unit.entropy / highest)


def test_figures_equal_a_recording(found) -> None:
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][:N]])
    recorded = regard.record(model(), ids)
    for unit in found.units:
        if unit.head is not None:
            assert unit.entropy == pytest.approx(float(recorded.mean_entropy()[unit.layer][0, unit.head]), abs=1e-4)
            assert unit.first == pytest.approx(float(recorded.span("first")[unit.layer][0, unit.head]), abs=1e-4)
    assert found.layers == list(recorded.layers)


def test_heads_are_read_in_groups(found, monkeypatch) -> None:
    monkeypatch.setattr("regard.study.inspect_weights._CHUNK_BYTES", 4 * N * N * 3)
    again = inspect((model(), tiny_tokenizer()), text=TEXT, tokens=N)
    for name in ("patterns", "flow", "received", "shares"):
        close(getattr(again, name), getattr(found, name))
    assert [u.role for u in again.units] == [u.role for u in found.units]


@pytest.mark.parametrize(
    ("shares", "role"),
    [
        ((0.6, 0.4, 1.0, 0, 0, 0), "itself"),
        ((0.1, 0.5, 0.7, 0, 0.4, 0), "previous token"),
        ((0, 0, 0, 0.7, 0.3, 0), "repetition"),
        ((0, 0, 0, 0.7, 0.2, 0.9), "first token"),
        ((0.2, 0.3, 0.7, 0, 0, 0.9), "nearby"),
        ((0, 0, 0, 0, 0, 0.8), "broad"),
        ((0, 0, 0, 0, 0, 0.2), "mixed"),
    ],
)
def test_roles(shares, role) -> None:
    names = ("itself", "previous", "near", "first", "repetition")
    assert role_of(dict(zip(names, shares, strict=False)), shares[-1]) == role
    assert role in ROLES


def test_tokens_read_as_the_text_and_spans_end_with_sentences(found) -> None:
    assert TEXT.startswith("".join(found.tokens))
    assert found.cut
    assert (found.spans[0], found.spans[-1]) == (0, N)
    inner = [found.tokens[edge - 1].rstrip()[-1:] for edge in found.spans[1:-1]]
    assert "." in inner
    whole = inspect((model(), tiny_tokenizer(bos=True)), text="A café. \U0001f600 Good?\n", tokens=60)
    assert not whole.cut
    assert whole.tokens[:2] == ["<s>", "A"]
    assert len(whole.tokens) == len(tiny_tokenizer(bos=True)("A café. \U0001f600 Good?\n").input_ids)


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "phi3"])
def test_other_families_and_two_tokens(name) -> None:
    assert len(inspect((model(name), tiny_tokenizer()), text=TEXT, tokens=40).units) == 15
    assert inspect((model(name), tiny_tokenizer()), text=TEXT, tokens=2).patterns.shape == (15, 2, 2)


def test_progress_and_refusals() -> None:
    seen = []
    inspect((model(), tiny_tokenizer()), text=TEXT, tokens=9, on_progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    pair = (model(), tiny_tokenizer())
    with pytest.raises(ArgumentError, match="tokens must be 2 to 4096, got 1"):
        inspect(pair, tokens=1)
    with pytest.raises(ArgumentError, match="the model reads at most 512, got 513"):
        inspect(pair, tokens=513)
    with pytest.raises(ArgumentError, match="expected at least 2 tokens, got 1"):
        inspect(pair, text="a")
    with pytest.raises(ArgumentError, match="text is empty"):
        inspect(pair, text=" ")
