"""Retrieval heads: the score against loops, a model that is known to copy with one head, and where heads look."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.methods.language.mask_heads import MaskHeads
from regard.methods.language.streaming_llm import StreamingLLM
from regard.probes import HeadScores, RetrievalScore, TopKeys, detect_retrieval_heads, find_needle
from regard.probes.retrieval_heads import greedy
from tests.probes.copy_model import COPY, Tokenizer, copy_model, runs
from tests.tiny_models import NAMES, tiny


def naive(attentions, tokens, span, prompt, topk, unique):
    """Steps 2 and 3 of the paper's procedure, head by head; `unique`: |g ∩ needle| / |needle| over sets of tokens."""
    layers, heads = len(attentions[0]), attentions[0][0].shape[1]
    found = torch.zeros(layers, heads, dtype=torch.float64)
    for at in range(layers):
        for head in range(heads):
            copied = []
            for rows, token in zip(attentions, tokens, strict=True):
                row = rows[at][0, head, -1].tolist()
                best = sorted(range(len(row)), key=lambda j, row=row: -row[j])[:topk]
                if any(span[0] <= j < span[1] and prompt[j] == token for j in best):
                    copied.append(token)
            needle = prompt[span[0] : span[1]]
            found[at, head] = len(set(copied)) / len(set(needle)) if unique else len(copied) / len(needle)
    return found


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    topk=st.integers(1, 4),
    unique=st.booleans(),
    n=st.integers(4, 15),
    steps=st.integers(1, 8),
    data=st.data(),
)
def test_score_is_the_definition(seed, topk, unique, n, steps, data) -> None:
    start = data.draw(st.integers(0, n - 1))
    span = (start, data.draw(st.integers(start + 1, n)))
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 4, (n,), generator=generator).tolist()
    tokens = torch.randint(0, 4, (steps,), generator=generator).tolist()
    attentions = [[torch.rand(1, 3, 1, n + t, generator=generator) for _ in range(2)] for t in range(steps)]
    score = RetrievalScore(2, 3, span, prompt, topk, unique=unique)
    for rows, token in zip(attentions, tokens, strict=True):
        score.update(rows, token)
    expected = naive(attentions, tokens, span, prompt, topk, unique)
    torch.testing.assert_close(score.result().double(), expected, atol=1e-6, rtol=0)


def test_repetition_counts_twice_unless_unique() -> None:
    look = torch.zeros(1, 1, 1, 3)
    look[..., 1] = 1
    for unique, expected in ((False, 1.0), (True, 0.5)):
        score = RetrievalScore(1, 1, (1, 3), [5, 6, 7], unique=unique)
        score.update([look], 6)
        score.update([look], 6)
        score.update([look], 7)  # looks at 6, says 7
        assert score.result().tolist() == [[expected]]


def test_the_needle_is_the_first_window_with_its_tokens() -> None:
    assert find_needle([9, 1, 2, 3, 4], [2, 3]) == (2, 4)
    assert find_needle([9, 3, 2, 3, 4], [2, 3]) == (1, 3)  # in any order
    assert find_needle([9, 3, 9, 2, 4], [2, 3]) == (-1, -1)
    assert find_needle([0, *range(1, 12)], [*range(1, 12), 99], overlap=0.9) == (0, 12)  # 11 of 12
    assert find_needle([1, 2], [2, 2, 2]) == (0, 3)  # a set: one 2 is enough


@pytest.mark.parametrize("name", [*NAMES, "mistral-sliding"])
def test_top_keys_are_those_of_eager_attention(name) -> None:
    """What the probe sees at each decoding step, against the weights that transformers returns."""
    model = tiny(name, attn_implementation="eager")
    length = 8 if name in ("mistral-sliding", "gemma3") else 30  # beyond their window keys are dropped
    prompt = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(1))
    probe = TopKeys(topk=3)
    with regard.apply(model, probe):
        tokens, tops = [], []
        for token in greedy(model, Silent(), prompt[0].tolist(), 4):
            tokens.append(token)
            tops.append({i: keys.clone() for i, keys in probe.keys.items()})
    whole = torch.cat([prompt, torch.tensor([tokens])], 1)
    with torch.no_grad():
        expected = model(whole, output_attentions=True)
    assert expected.logits[0, length - 1 : -1].argmax(-1).tolist() == tokens
    for step, top in enumerate(tops):
        for i, keys in top.items():
            row = expected.attentions[i][0, :, length - 1 + step, : length + step]
            torch.testing.assert_close(row.gather(-1, keys[0]), row.topk(3).values, atol=1e-6, rtol=1e-5)


def test_the_copy_head_and_no_other() -> None:
    model, tokenizer, questions = copy_model(), Tokenizer(), runs()
    seen = []
    found = detect_retrieval_heads(
        model, tokenizer, questions, max_new_tokens=10, on_progress=lambda *step: seen.append(step)
    )
    assert seen == [(i + 1, len(questions)) for i in range(len(questions))]
    assert min(found.recalls) >= 0.95
    assert found.mean[COPY] >= 0.9
    others = found.mean.clone()
    others[COPY] = 0
    assert others.max() < 0.1
    assert found.retrieval_heads() == [COPY]
    assert found.counts[COPY] == len(questions)

    def recall(blind, decoding_only):
        masked = MaskHeads(targets=blind, decoding_only=decoding_only)
        again = detect_retrieval_heads(model, tokenizer, questions, methods=[masked], max_new_tokens=10)
        return sum(again.recalls) / len(again.recalls)

    before = sum(found.recalls) / len(found.recalls)
    for decoding_only in (True, False):
        assert recall(found.ranking()[:1], decoding_only) <= 0.2
        assert abs(recall(found.ranking()[-1:], decoding_only) - before) < 0.05


def test_only_right_answers_count() -> None:
    model, questions = copy_model(), runs(4)
    wrong = questions[1]
    wrong = type(wrong)(type(wrong.needle)("w1 x y z", "?", "x y z"), wrong.prompt, wrong.span, wrong.depth)
    found = detect_retrieval_heads(model, Tokenizer(), [questions[0], wrong, questions[2]], max_new_tokens=9)
    assert found.kept == (True, False, True)
    assert len(found.scores) == 2
    alone = detect_retrieval_heads(model, Tokenizer(), [questions[0], questions[2]], max_new_tokens=9)
    torch.testing.assert_close(found.mean, alone.mean)
    none = detect_retrieval_heads(model, Tokenizer(), [wrong], max_new_tokens=9)
    with pytest.raises(ArgumentError, match="no run counted"):
        none.ranking()


def test_ranking_and_control() -> None:
    scores = torch.tensor([[[0.1, 0.5], [0.0, 0.1]], [[0.1, 0.7], [0.0, 0.1]]])
    found = HeadScores(scores, (1.0, 1.0), (True, True), ("", ""), 0.1)
    assert found.ranking() == [(0, 1), (0, 0), (1, 1), (1, 0)]
    assert found.retrieval_heads() == [(0, 1), (0, 0), (1, 1)]
    assert found.counts.tolist() == [[2, 2], [0, 2]]
    assert set(found.random_heads(2, outside=2)) == {(1, 1), (1, 0)}
    assert found.random_heads(2, 1, seed=3)[:1] == found.random_heads(1, 1, seed=3)
    with pytest.raises(ArgumentError, match="count: 2 heads are not among"):
        found.random_heads(3, 2)


def test_refusals() -> None:
    model = tiny("llama")
    with pytest.raises(ArgumentError, match="needle_span: expected one inside 3 tokens"):
        RetrievalScore(1, 1, (2, 4), [1, 2, 3])
    with pytest.raises(ArgumentError, match="topk must be at least 1, got 0"):
        RetrievalScore(1, 1, (0, 1), [1], topk=0)
    with pytest.raises(ArgumentError, match="topk must be at least 1, got 0"):
        TopKeys(topk=0)
    with pytest.raises(ShapeError, match="attentions: expected 2 layers, got 1"):
        RetrievalScore(2, 1, (0, 1), [1]).update([torch.rand(1, 1, 1, 3)], 1)
    with pytest.raises(ShapeError, match="keys: expected"):
        RetrievalScore(2, 1, (0, 1), [1]).update_keys(torch.zeros(2, 3, 1, dtype=torch.long), 1)
    with pytest.raises(ArgumentError, match="needle_ids"):
        find_needle([1, 2], [])
    with pytest.raises(ArgumentError, match="runs: expected at least one"):
        detect_retrieval_heads(model, Tokenizer(), [])
    with pytest.raises(ArgumentError, match="prompt: expected two tokens"):
        list(greedy(model, Tokenizer(), [5], 3))
    question = runs(1, length=60)[0]
    with pytest.raises(Unsupported, match="keys were dropped"):
        detect_retrieval_heads(model, Silent(), [question], methods=[StreamingLLM(start_size=1, recent_size=8)])


class Silent:
    """Never ends."""

    eos_token_id = -1

    def decode(self, ids, skip_special_tokens=False):
        return "x"
