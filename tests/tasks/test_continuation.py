"""Continuation choice: what items are made of, and their scores against one forward per candidate."""

import pytest
import torch

import regard
from regard.errors import ArgumentError
from regard.methods.language.sliding_window import SlidingWindow
from regard.tasks.continuation import continuation_items, continuation_scores
from tests.tiny_models import tiny

TOKENS = torch.randint(3, 20, (600,), generator=torch.Generator().manual_seed(0)).tolist()


def places(part: tuple[int, ...]) -> list[int]:
    return [p for p in range(len(TOKENS)) if tuple(TOKENS[p : p + len(part)]) == part]


def test_items_come_from_the_text() -> None:
    items = continuation_items(TOKENS, 15, context=20, length=5, choices=4, seed=3)
    assert len({item.answer for item in items}) > 1
    used: list[int] = []
    for item in items:
        (start,) = places(item.context)
        used += range(start, start + 25)
        assert places((*item.context, *item.candidates[item.answer])) == [start]
        assert len(set(item.candidates)) == 4
        for wrong in {*item.candidates} - {item.candidates[item.answer]}:
            assert places((item.context[-1], *wrong))
    assert len(set(used)) == len(used)
    assert items == continuation_items(TOKENS, 15, context=20, length=5, choices=4, seed=3)
    assert items != continuation_items(TOKENS, 15, context=20, length=5, choices=4, seed=4)


@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_scores_are_mean_log_probabilities(length: int) -> None:
    """Also under a method, whose cache is repeated for the candidates."""
    model = tiny("llama")
    items = continuation_items(TOKENS, 5, context=12, length=length, choices=3)
    seen: list[tuple[int, int]] = []
    with regard.apply(model, SlidingWindow(window_size=6)):
        got = continuation_scores(model, items, batch_size=2, on_progress=lambda *at: seen.append(at))
        assert seen == [(2, 5), (4, 5), (5, 5)]
        for item, row in zip(items, got, strict=True):
            for candidate, score in zip(item.candidates, row, strict=True):
                text = torch.tensor([[*item.context, *candidate]])
                logs = model(text).logits[0].log_softmax(-1)
                want = sum(float(logs[11 + i, token]) for i, token in enumerate(candidate)) / length
                assert float(score) == pytest.approx(want, abs=1e-5)


def test_refuses() -> None:
    with pytest.raises(ArgumentError, match="two choices, got 5, 48, 8 and 1"):
        continuation_items(TOKENS, 5, choices=1)
    with pytest.raises(ArgumentError, match="count: a text of 600 tokens gives 12 such items, expected 50"):
        continuation_items(TOKENS, 50, length=2)
