"""Image tasks; random photos and small files stand in for the real data."""

import json

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks import corpora, images
from regard.tasks.images import TEXTURES, UPRIGHT, Digits, ImageBatch, Patches, region, resample, top1


@pytest.fixture
def photos(monkeypatch):
    """Every photo in two levels of its own per split, so that a patch says where it comes from."""
    shape = (60, 80)
    made = {}
    for i, name in enumerate(corpora.PHOTOS):
        g = torch.Generator().manual_seed(i)
        pixels = torch.rand(shape, generator=g)
        pixels[:, 60:] += 10
        made[name] = pixels
    monkeypatch.setattr(corpora, "photo", made.__getitem__)
    return made


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """MNIST's format: ten digits of each class; pixel (0, 0) is the class, (0, 1) the number within it."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for digit in range(10):
        flat = []
        for number in range(10):
            flat += [digit / 255, number / 255] + [0] * 781 + [1]
        (folder / f"{digit}.json").write_text(json.dumps({"data": flat}))
    monkeypatch.setenv("REGARD_DATA", str(tmp_path))
    corpora.mnist.cache_clear()
    yield folder
    corpora.mnist.cache_clear()


def test_mnist_is_kept_in_a_compact_file(digits):
    first = corpora.mnist()
    assert first.images.shape == (100, 28, 28)
    assert first.images.dtype == torch.uint8
    assert torch.equal(first.images[:, 0, 0].long(), first.labels)
    assert torch.equal(first.labels, torch.arange(100) // 10)
    assert first.images[:, -1, -1].eq(255).all()
    for path in digits.glob("*.json"):
        path.unlink()
    assert [path.name for path in digits.iterdir()] == ["digits.npz"]
    corpora.mnist.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(corpora.mnist(), first, strict=True))


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(ArgumentError, match="make data"):
        corpora.mnist(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="'mona lisa'"):
        corpora.photo("mona lisa")


def test_digits_for_tests_are_never_trained_on(digits, monkeypatch):
    monkeypatch.setattr(images, "_standard", lambda x: x)
    task = Digits("mnist", size=28)
    assert (task.name, task.test_size) == ("digits mnist", 10)
    train, test = task.batch("train", 0, 500), task.batch("test", 0, 7)
    number = {
        name: (255 * batch.images[:, 0, 0, 1]).round().int().unique().tolist()
        for name, batch in (("train", train), ("test", test))
    }
    assert number == {"train": list(range(1, 10)), "test": [0]}
    assert train.targets.bincount().tolist() == [50] * 10
    assert torch.equal((255 * train.images[:, 0, 0, 0]).round().long(), train.targets)
    rest = task.batch("test", 1, 7)
    assert torch.cat([test.targets, rest.targets]).tolist() == list(range(10))


def test_the_last_small_digits_are_for_tests(monkeypatch):
    pixels = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 8, 8)
    monkeypatch.setitem(images._DIGITS, "8x8", lambda: corpora.Digits(pixels, torch.arange(100) % 10))
    monkeypatch.setattr(images, "_standard", lambda x: x)
    task = Digits("8x8", size=16)
    assert task.test_size == 20
    assert (255 * task.batch("train", 3, 400).images).round().max() == 79
    assert (255 * task.batch("test", 0, 20).images[:, 0, 0, 0]).round().tolist() == list(range(80, 100))


@pytest.mark.parametrize("task", [Patches("texture", 16, (8, 20)), Patches("rotation", 16, (8, 20))])
def test_patches_come_from_the_split_and_classes_equally_often(photos, task, monkeypatch):
    monkeypatch.setattr(images, "_standard", lambda x: x)
    batches = {split: task.batch(split, 0, 40) for split in ("train", "test")}
    assert batches["train"].images.shape == (40, 1, 16, 16)
    assert batches["train"].images.max() <= 1  # not one pixel of the other part, also where it is interpolated
    assert batches["test"].images.min() >= 10
    for batch in batches.values():
        assert batch.targets.bincount().tolist() == [40 // task.num_classes] * task.num_classes
    again = task.batch("train", 0, 40)
    assert all(torch.equal(a, b) for a, b in zip(again, batches["train"], strict=True))
    for other in (task.batch("train", 1, 40), task.batch("train", 0, 40, seed=1)):
        assert not torch.equal(other.images, again.images)


def test_textures_and_turns_are_what_the_labels_say(photos, monkeypatch):
    monkeypatch.setattr(images, "_standard", lambda x: x)
    for i, name in enumerate(TEXTURES):
        photos[name].fill_(i)
    batch = Patches("texture", 4, (8, 8)).batch("train", 0, 16)
    torch.testing.assert_close(batch.images.mean((1, 2, 3)), batch.targets.float())
    for name in UPRIGHT:
        photos[name].copy_(torch.linspace(0, 1, 60)[:, None].expand(60, 80))  # dark above, bright below
    batch = Patches("rotation", 8, (10, 20)).batch("test", 0, 16)
    for image, target in zip(batch.images[:, 0], batch.targets.tolist(), strict=True):
        edges = [image[0], image[:, 0], image[-1], image[:, -1]]  # what was above, after 0 to 3 quarters to the left
        assert min(range(4), key=lambda i: edges[i].mean()) == target


def test_images_have_no_brightness_and_contrast(photos):
    batch = Patches("texture", 16, (8, 20)).batch("train", 0, 8).images
    torch.testing.assert_close(batch.mean((1, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.square().mean((1, 2, 3)), torch.ones(8))


def test_parts_of_a_photo_do_not_overlap():
    pixels = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(torch.cat([region(pixels, "train"), region(pixels, "test")], 1), pixels)


def test_top1_and_resampling():
    batch = ImageBatch(torch.ones(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
    assert top1(torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]]), batch.targets) == 0.5
    torch.testing.assert_close(resample(batch.images, 12), torch.ones(4, 1, 12, 12))


def test_bad_arguments_are_refused(photos):
    with pytest.raises(ArgumentError, match="label"):
        Patches("colour")
    with pytest.raises(ArgumentError, match="source"):
        Digits("cifar")
    with pytest.raises(ArgumentError, match="sides"):
        Patches(sides=(9, 8))
    with pytest.raises(ArgumentError, match="size"):
        Digits(size=0)
    with pytest.raises(ArgumentError, match=r"the test part of .* has"):
        Patches("texture", 8, (21, 21)).batch("test", 0, 8)
