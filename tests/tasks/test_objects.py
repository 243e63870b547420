"""Pictures of objects: labels, boxes and halves agree with what is painted, and nothing else tells the class."""

import pytest
import torch

from regard.errors import ArgumentError
from regard.tasks.objects import KINDS, Objects


def test_objects_stand_in_their_boxes_and_halves() -> None:
    task = Objects()
    batch = task.batch("test", 0, 64)
    assert batch.images.shape == (64, 3, 32, 32)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    assert torch.equal(batch.labels.sum(1), torch.full((64,), 2))
    assert batch.labels.gather(1, batch.classes).all()
    top, left, bottom, right = batch.boxes.unbind(-1)
    assert (top >= 0).all()
    assert (bottom <= 32).all()
    assert torch.equal(bottom - top, right - left)
    assert ((bottom - top >= 11) & (bottom - top <= 15)).all()
    assert (left[:, 0] >= 0).all()
    assert (right[:, 0] <= 16).all()
    assert (left[:, 1] >= 16).all()
    assert (right[:, 1] <= 32).all()


def test_the_box_holds_the_object_and_nothing_else_changes() -> None:
    """The same draws without the objects: what differs are pixels inside the boxes, most of them at its middle."""
    task = Objects()
    with pytest.MonkeyPatch.context() as patch:
        painted = task.batch("train", 3, 32)
        empty = torch.zeros(32, 32, 32, dtype=torch.bool)

        def nothing(self, kind, corner, side, g):
            torch.rand(len(kind), generator=g)  # the turn
            return empty, torch.ones(32, 32, 32)

        patch.setattr(Objects, "_object", nothing)
        bare = task.batch("train", 3, 32)
    changed = (painted.images != bare.images).any(1)
    inside = torch.zeros_like(changed)
    for i in range(32):
        for top, left, bottom, right in painted.boxes[i].tolist():
            inside[i, top:bottom, left:right] = True
            share = changed[i, top:bottom, left:right].double().mean()
            assert 0.2 < share < 0.95, KINDS
    assert not (changed & ~inside).any()


def test_single_pictures_and_determinism() -> None:
    batch = Objects(single=1.0).batch("test", 1, 40, seed=2)
    assert torch.equal((batch.classes >= 0).sum(1), torch.ones(40, dtype=torch.long))
    assert torch.equal(batch.labels.sum(1), torch.ones(40, dtype=torch.long))
    assert 5 < (batch.classes[:, 0] >= 0).sum() < 35
    again = Objects(single=1.0).batch("test", 1, 40, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    for other in (("train", 1, 2), ("test", 2, 2), ("test", 1, 3)):
        split, index, seed = other
        assert not torch.equal(Objects(single=1.0).batch(split, index, 40, seed).images, batch.images)
    some = Objects(single=0.5).batch("test", 0, 400).labels.sum(1)
    assert 150 < (some == 1).sum() < 250


def test_classes_come_equally_often_and_colour_does_not_tell() -> None:
    batch = Objects().batch("train", 0, 600)
    counts = batch.labels.sum(0)
    assert ((counts > 150) & (counts < 250)).all()
    middle = batch.images.mean((2, 3))
    means = torch.stack([middle[batch.labels[:, k]].mean(0) for k in range(len(KINDS))])
    assert (means - means.mean(0)).abs().max() < 0.06


@pytest.mark.parametrize(
    "arguments", [{"size": 33}, {"sides": (3, 9)}, {"sides": (12, 11)}, {"sides": (11, 17)}, {"single": 1.5}]
)
def test_refusals(arguments) -> None:
    with pytest.raises(ArgumentError):
        Objects(**arguments)
