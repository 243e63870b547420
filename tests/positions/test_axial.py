"""Rotary embedding on grids."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.positions import axial_angles, grid_coordinates, pairs_to_halves, rotate


def test_coordinates_run_through_the_last_axis_first() -> None:
    assert grid_coordinates(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_scores_depend_on_differences_of_rows_and_columns() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(12), torch.randn(12)
    cos, sin = axial_angles(grid_coordinates(4, 5), torch.tensor([1.0, 0.3, 0.1]))
    scores = (rotate(q.expand(20, 12), cos, sin) @ rotate(k.expand(20, 12), cos, sin).mT).view(4, 5, 4, 5)
    torch.testing.assert_close(scores[1, 2, 3, 1], scores[0, 3, 2, 2])
    torch.testing.assert_close(scores[0, 0, 1, 1], scores[2, 3, 3, 4])
    assert not torch.isclose(scores[1, 2, 3, 1], scores[1, 2, 1, 3])


@pytest.mark.parametrize("interleaved", [True, False])
def test_permuted_weights_give_the_scores_of_other_layouts(interleaved: bool) -> None:
    """Against a rotation of each pair written out, one axis after the other."""
    torch.manual_seed(0)
    heads, axes, pairs, n = 2, 2, 2, 6
    dim = axes * pairs * 2
    wq, wk, x = torch.randn(heads * dim, 5), torch.randn(heads * dim, 5), torch.randn(n, 5)
    coordinates, frequencies = grid_coordinates(2, 3), torch.tensor([1.0, 0.2])

    def turned(t: torch.Tensor) -> torch.Tensor:
        t = t.view(n, heads, axes, dim // axes).clone()
        for a in range(axes):
            for p in range(pairs):
                i, j = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
                angle = coordinates[:, a, None] * frequencies[p]
                first, second = t[:, :, a, i].clone(), t[:, :, a, j].clone()
                t[:, :, a, i] = first * angle.cos() - second * angle.sin()
                t[:, :, a, j] = second * angle.cos() + first * angle.sin()
        return t.flatten(2).transpose(0, 1)

    want = turned(x @ wq.T) @ turned(x @ wk.T).mT
    cos, sin = axial_angles(coordinates, frequencies)
    q, k = (
        rotate((x @ pairs_to_halves(w, heads, axes, interleaved).T).view(n, heads, dim).transpose(0, 1), cos, sin)
        for w in (wq, wk)
    )
    torch.testing.assert_close(q @ k.mT, want)


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError, match="coordinates"):
        axial_angles(torch.arange(3), torch.ones(2))
    with pytest.raises(ArgumentError, match="no pairs"):
        pairs_to_halves(torch.randn(6, 2), 2, axes=2)
