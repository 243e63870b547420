import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks import english
from regard.tasks.sequence import AssociativeRecall, ByteText, Needle, SelectiveCopying, accuracy, bits

TASKS = [AssociativeRecall(), SelectiveCopying(), ByteText(64), Needle(64), Needle(9, 4), AssociativeRecall(1, 1, 2)]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_batches_are_made_from_their_arguments_alone(task):
    first, again = task.batch("train", 3, 16, seed=5), task.batch("train", 3, 16, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(t.shape == (16, task.length) for t in first)
    assert first.ids.min() >= 0
    assert max(first.ids.max(), first.targets.max()) < task.vocab_size
    for other in (task.batch("test", 3, 16, 5), task.batch("train", 4, 16, 5), task.batch("train", 3, 16, 6)):
        assert not (torch.equal(other.ids, first.ids) and torch.equal(other.targets, first.targets))


def test_recall_asks_for_what_was_said():
    ids, targets, weights = AssociativeRecall(5, 9, 7).batch("train", 0, 8)
    for row, target, weight in zip(ids.tolist(), targets.tolist(), weights.tolist(), strict=True):
        said = {row[i]: row[i + 1] for i in range(0, 10, 2)}
        assert len(said) == 5
        asked = [i for i, w in enumerate(weight) if w]
        assert sorted(row[i] for i in asked) == sorted(said)
        assert all(target[i] == said[row[i]] for i in asked)


def test_copying_gives_the_symbols_back_in_order():
    ids, targets, weights = SelectiveCopying(4, 20, 6).batch("test", 1, 8)
    for row, target, weight in zip(ids.tolist(), targets.tolist(), weights.tolist(), strict=True):
        assert [s for s in row if s > 1] == [t for t, w in zip(target, weight, strict=True) if w]
        assert row[20:] == [1] * 4


def test_needle_is_in_the_text_before_it_is_asked_for():
    ids, targets, weights = Needle(60, 4).batch("train", 2, 32)
    for row, target, weight in zip(ids.tolist(), targets.tolist(), weights.tolist(), strict=True):
        first, asked = (i for i, token in enumerate(row) if token == 128)
        assert asked == 56
        assert first + 5 <= asked
        assert row[first + 1 : first + 5] == [t for t, w in zip(target, weight, strict=True) if w]


def test_text_of_the_test_is_not_trained_on():
    text = english().encode("ascii", "replace").decode()
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("test", text[cut:])):
        batch = ByteText(80).batch(split, 0, 8)
        assert all(bytes(row).decode() in part for row in batch.ids.tolist())
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])


def test_scores_count_weighed_positions_only():
    batch = SelectiveCopying(4, 20, 6).batch("test", 1, 8)
    right = torch.nn.functional.one_hot(batch.targets, 8).float()
    wrong = torch.where(batch.weights[..., None] > 0, right.roll(1, -1), right)
    assert accuracy(right, batch) == 1.0
    assert accuracy(wrong, batch) == 0.0
    assert bits(torch.zeros_like(right), batch) == pytest.approx(3.0)  # uniform over 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: AssociativeRecall(9, 8),
        lambda: SelectiveCopying(9, 8),
        lambda: ByteText(0),
        lambda: Needle(8, 4),
        lambda: ByteText(10**7).batch("train", 0, 1),
        lambda: ByteText(8).batch("valid", 0, 1),
        lambda: ByteText(8).batch("train", -1, 1),
    ],
)
def test_refusals(make):
    with pytest.raises(ArgumentError):
        make()


def test_needles_in_generated_text():
    task = Needle(64, 2, text="generated")
    assert task.name == "needle (generated)"
    ids = task.batch("train", 3, 4).ids
    assert ids.shape == (4, 64)
    text = bytes(b for b in ids[0].tolist() if b < 128).decode()
    assert "the " in text
    assert not torch.equal(ids, task.batch("test", 3, 4).ids)
    with pytest.raises(ArgumentError, match="text"):
        Needle(text="other")
