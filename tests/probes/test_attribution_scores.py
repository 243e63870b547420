"""Pointing game, insertion and deletion by hand; equals; and refusals."""

import pytest
import torch
from torch import nn

from regard.errors import ArgumentError, ShapeError
from regard.probes import insertion_deletion, pointing_game


def test_pointing_game_by_hand() -> None:
    maps = torch.zeros(4, 3, 4)
    maps[0, 1, 2] = 1.0  # inside
    maps[1, 2, 2] = 1.0  # a row below
    maps[2, 1, 2] = maps[2, 0, 0] = 2.0  # one of two
    boxes = torch.tensor([[1, 2, 2, 4]] * 4)
    assert pointing_game(maps, boxes).tolist() == [1.0, 0.0, 0.5, pytest.approx(2 / 12)]
    inside = torch.zeros(4, 3, 4, dtype=torch.bool)
    inside[:, 1, 2:] = True
    assert torch.equal(pointing_game(maps, inside), pointing_game(maps, boxes))
    assert torch.equal(pointing_game(maps - 5, boxes.float()), pointing_game(maps, boxes))


class Sum(nn.Module):
    """Logits (w · first channel, 0)."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x[:, 0] * self.w).sum((1, 2))
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_insertion_and_deletion_by_hand() -> None:
    """Pixels worth 8, 4, 2, 1 in a model that adds them up; probability = share of the sum."""
    w = torch.tensor([[8.0, 4.0], [2.0, 1.0]])
    model, x = Sum(w), torch.ones(2, 1, 2, 2)
    maps = torch.stack([w, -w])  # best and worst first

    def share(logits: torch.Tensor) -> torch.Tensor:
        return logits / 15

    found = insertion_deletion(model, x, maps, 0, steps=4, probability=share)
    assert found.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    torch.testing.assert_close(found.insertion_curve * 15, torch.tensor([[0.0, 8, 12, 14, 15], [0.0, 1, 3, 7, 15]]))
    torch.testing.assert_close(found.deletion_curve * 15, torch.tensor([[15.0, 7, 3, 1, 0], [15.0, 14, 12, 8, 0]]))
    area = (15 / 2 + 8 + 12 + 14) / 4 / 15
    torch.testing.assert_close(found.insertion[0], torch.tensor(area))
    torch.testing.assert_close(found.insertion + found.deletion, torch.ones(2))  # of an additive model
    coarse = insertion_deletion(model, x, maps, 0, steps=2, probability=share, batch_size=1)
    torch.testing.assert_close(coarse.insertion_curve, found.insertion_curve[:, ::2])


def test_softmax_the_most_likely_class_and_the_baseline() -> None:
    model, x = Sum(torch.full((2, 2), -1.0)), torch.ones(1, 3, 2, 2)
    found = insertion_deletion(model, x, torch.rand(1, 2, 2), steps=4)
    want = torch.softmax(torch.tensor([[0.0, 0], [-1, 0], [-2, 0], [-3, 0], [-4, 0]]), 1)[:, 1]  # class 1 wins
    torch.testing.assert_close(found.insertion_curve[0], want)
    torch.testing.assert_close(found.deletion_curve[0], want.flip(0))
    blank = torch.tensor([3.0, 0.0, 0.0])[:, None, None]
    grey = insertion_deletion(model, x, torch.rand(1, 2, 2), 0, steps=1, baseline=blank, probability=torch.sigmoid)
    torch.testing.assert_close(grey.insertion_curve[0], torch.sigmoid(torch.tensor([-12.0, -4.0])))


def test_equals_go_in_random_order() -> None:
    """A constant map gives every place the same chance, on average the straight line of an additive model."""
    w = torch.zeros(8, 8)
    w[:, 0] = 1 / 8
    x = torch.ones(200, 1, 8, 8)
    found = insertion_deletion(Sum(w), x, torch.zeros(200, 8, 8), 0, steps=4, probability=lambda logits: logits)
    torch.testing.assert_close(found.insertion.mean(), torch.tensor(0.5), atol=0.02, rtol=0)
    again = insertion_deletion(Sum(w), x, torch.zeros(200, 8, 8), 0, steps=4, probability=lambda logits: logits)
    assert torch.equal(found.insertion, again.insertion)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: pointing_game(torch.rand(3, 3), torch.zeros(1, 4)), ShapeError, "maps"),
        (lambda: pointing_game(torch.rand(2, 3, 3), torch.zeros(1, 4)), ShapeError, "boxes: expected"),
        (lambda: pointing_game(torch.rand(2, 3, 3), torch.zeros(2, 3, 3)), ShapeError, "boxes: expected"),
        (lambda: pointing_game(torch.full((1, 3, 3), torch.nan), torch.zeros(1, 4)), ArgumentError, "maps"),
    ],
)
def test_pointing_game_refuses(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"x": torch.rand(1, 2, 2)}, ShapeError, "x: expected pictures"),
        ({"maps": torch.rand(2, 2, 2)}, ShapeError, "maps: expected"),
        ({"maps": torch.full((1, 2, 2), torch.nan)}, ArgumentError, "maps: expected numbers"),
        ({"steps": 5}, ArgumentError, "steps"),
        ({"steps": 0}, ArgumentError, "steps"),
        ({"baseline": torch.rand(5)}, ShapeError, "baseline"),
        ({"target": 2}, ArgumentError, "target: expected classes 0..1"),
    ],
)
def test_insertion_deletion_refuses(arguments, error, match) -> None:
    given = {"model": Sum(torch.ones(2, 2)), "x": torch.rand(1, 1, 2, 2), "maps": torch.rand(1, 2, 2), "steps": 2}
    with pytest.raises(error, match=match):
        insertion_deletion(**given | arguments)
