"""Brown in its own format, ratings, and the tasks on them; small files stand in for the real data."""

import math

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks import classification, corpora
from regard.tasks.classification import GENRES, Genres
from regard.tasks.corpora import brown, ratings
from regard.tasks.recommendation import NextItem
from regard.tasks.sequence import Batch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten samples of each of four categories, every one of a word of its own."""
    root = tmp_path / "brown"
    root.mkdir()
    words = {"news": "press", "lore": "prose", "learned": "study", "humor": "story"}
    lines = []
    for letter, (category, word) in zip("abcd", words.items(), strict=True):
        for i in range(10):
            name = f"c{letter}{i:02}"
            (root / name).write_text(f"\n\tThe/at {word}{i}/nn ,/, ``/`` and/or/cc ''/'' so/rb ./.\n" * 9)
            lines.append(f"{name} {category}")
    (root / "cats.txt").write_text("\n".join(lines))
    monkeypatch.setenv("REGARD_DATA", str(tmp_path))
    for cached in (brown, classification._texts):
        cached.cache_clear()
    yield root
    for cached in (brown, classification._texts):
        cached.cache_clear()


def test_tags_are_taken_off(folder):
    first = brown()[0]
    assert first[:2] == ("ca00", "news")
    assert first.text.startswith('The press0, " and/or " so. The press0')
    assert len(brown()) == 40


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(ArgumentError, match="make data"):
        brown(tmp_path / "nowhere")


def test_genres_come_equally_often_and_tests_apart(folder):
    task = Genres(length=20)
    assert task.num_classes == len(GENRES) == 4
    batch = task.batch("train", 0, 400)
    assert batch.ids.shape == (400, 20)
    assert batch.targets.bincount().min() > 70
    text = {split: bytes(task.batch(split, 0, 300).ids.flatten().tolist()).decode() for split in ("train", "test")}
    assert "press0" in text["test"]
    assert "press0" not in text["train"]
    assert "story3" in text["train"]
    assert torch.equal(batch.ids, task.batch("train", 0, 400).ids)
    logits = torch.nn.functional.one_hot(batch.targets, 4).float()
    assert task.score(logits, batch) == 1.0
    with pytest.raises(ArgumentError, match="length"):
        Genres(length=10**6).batch("test", 0, 1)


def test_ratings_are_ordered_by_time():
    found = ratings([2, 1, 1, 2, 1], [30, 10, 20, 10, 30], [5, 9, 1, 1, 4])
    assert found.num_items == 3
    assert [items.tolist() for items in found.users] == [[1, 2, 0], [0, 2]]


def test_the_last_item_is_for_tests():
    data = corpora.Ratings((torch.arange(10), torch.arange(10, 16)), 16)
    task = NextItem(length=3, data=data)
    assert task.vocab_size == 16
    train, test = task.batch("train", 0, 200), task.batch("test", 0, 50)
    assert not {9, 15} & set(train.targets.flatten().tolist())
    assert set(train.targets[:, -1].tolist()) == {3, 4, 5, 6, 7, 8, 13, 14}
    assert set(test.targets[:, -1].tolist()) == {9, 15}
    assert test.weights.sum(1).eq(1).all()
    assert set(NextItem(length=6, data=data).batch("test", 0, 50).targets[:, -1].tolist()) == {9}
    with pytest.raises(ArgumentError, match="no user has more than 10"):
        NextItem(length=10, data=data).batch("train", 0, 1)


def test_ndcg_leaves_the_history_out():
    task = NextItem(length=3, data=corpora.Ratings((torch.arange(10),), 20))
    ids, targets = torch.tensor([[0, 1, 2]] * 3), torch.tensor([[1, 2, 3]] * 3)
    logits = torch.zeros(3, 3, 20)
    logits[0, -1, [0, 1, 2]] = 9.0  # seen before: no rivals
    logits[0, -1, 3] = 5.0
    logits[1, -1, [4, 5]] = 9.0
    logits[1, -1, 3] = 5.0
    logits[2, -1] = torch.arange(20.0)
    score = task.score(logits, Batch(ids, targets, torch.ones(3, 3)))
    assert score == pytest.approx((1 + 1 / math.log2(4) + 0) / 3)
