"""Effective receptive fields: windows are exactly their windows, linear maps have their own norms."""

import pytest
import torch
from torch import nn

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.neighborhood import NeighborhoodAttention
from regard.probes import reach


def test_it_is_zero_exactly_outside_of_a_neighborhood() -> None:
    seen = reach(NeighborhoodAttention(8, 2, kernel_size=3), torch.randn(1, 6, 7, 8), (2, 6))
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[1:4, 4:7] = True  # shifted inside at the border
    assert (seen > 0).equal(expected)


def test_of_a_linear_map_it_is_the_norm_of_its_weights() -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * x.roll(1, dims=2)

    seen = reach(Shift(), torch.randn(1, 4, 4, 5), (1, 2))
    expected = torch.zeros(4, 4)
    expected[1, 1] = 3
    torch.testing.assert_close(seen, expected)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match="x: expected"):
        reach(nn.Identity(), torch.randn(4, 4, 5), (0, 0))
    with pytest.raises(ArgumentError, match="query: "):
        reach(nn.Identity(), torch.randn(1, 4, 4, 5), (4, 0))
    with pytest.raises(ShapeError, match="module: expected a grid"):
        reach(nn.Flatten(), torch.randn(1, 4, 4, 5), (0, 0))
