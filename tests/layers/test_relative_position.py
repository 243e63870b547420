"""Relative position biases against pairs looked up one by one; squeeze and excite against its definition."""

import itertools

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers.relative_position import (
    DynamicPositionBias,
    RelativePositionBias,
    load_resized,
    relative_index,
    relative_offsets,
    reversed_table,
)
from regard.layers.squeeze_excite import SqueezeExcite


@pytest.mark.parametrize("size", [1, 3, (2, 4), (2, 1, 3)])
def test_the_index_finds_query_minus_key(size) -> None:
    shape = (size, size) if isinstance(size, int) else size
    tokens = list(itertools.product(*map(range, shape)))
    offsets, index = relative_offsets(size), relative_index(size)
    assert len({tuple(o.tolist()) for o in offsets}) == len(offsets)
    for (i, query), (j, key) in itertools.product(enumerate(tokens), repeat=2):
        assert offsets[index[i, j]].tolist() == [q - k for q, k in zip(query, key, strict=True)]


def test_a_table_of_key_minus_query_is_turned_around() -> None:
    bias = RelativePositionBias((2, 3), 2)
    published = torch.randn(2, 3, 5)
    bias.table.data = reversed_table(published)
    got = bias()
    tokens = list(itertools.product(range(2), range(3)))
    for (i, (y, x)), (j, (v, u)) in itertools.product(enumerate(tokens), repeat=2):
        assert got[:, i, j].tolist() == published[:, v - y + 1, u - x + 2].tolist()


def test_tables_of_other_sizes() -> None:
    """Offsets keep their share of the window: those of 3 × 3 tokens, -2 to 2, are 3/5 as far apart as -1, 0, 1."""
    torch.manual_seed(0)
    small, large = RelativePositionBias(2, 2), RelativePositionBias((3, 2), 2)
    load_resized(large, small)
    table = small.table.view(3, 3, 2)
    for row, place in enumerate(torch.arange(5) * 0.6 - 0.2):
        low = min(max(place.floor().int().item(), 0), 1)
        share = (place.clamp(0, 2) - low).item()
        want = (1 - share) * table[low] + share * table[low + 1]
        torch.testing.assert_close(large.table.view(5, 3, 2)[row], want)
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": small})
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": RelativePositionBias((3, 2), 2)})
    load_resized(other, layers)
    torch.testing.assert_close(other["b"].table, large.table)
    torch.testing.assert_close(other["a"].weight, layers["a"].weight)
    with pytest.raises(ArgumentError, match="does not fit"):
        load_resized(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": small}), layers)


def test_a_network_gives_biases_for_any_window() -> None:
    torch.manual_seed(0)
    bias = DynamicPositionBias(64, 2).double()
    large, small = bias(4), bias((2, 3))
    assert large.shape == (2, 16, 16)
    tokens = list(itertools.product(range(2), range(3)))
    for (i, (y, x)), (j, (v, u)) in itertools.product(enumerate(tokens), repeat=2):
        torch.testing.assert_close(small[:, i, j], large[:, 4 * y + x, 4 * v + u])
        p = bias.pos_proj(torch.tensor([y - v, x - u], dtype=torch.float64))
        for stage in (bias.pos1, bias.pos2, bias.pos3):
            p = stage[2].weight @ torch.nn.functional.layer_norm(p, (4,), stage[0].weight, stage[0].bias).relu()
            p = p + stage[2].bias
        torch.testing.assert_close(small[:, i, j], p)


def test_squeeze_and_excite() -> None:
    torch.manual_seed(0)
    layer = SqueezeExcite(4, 2, torch.nn.SiLU)
    x = torch.randn(2, 3, 5, 4)
    hidden = torch.nn.functional.silu(x.flatten(1, 2).mean(1) @ layer.fc1.weight.T + layer.fc1.bias)
    gate = (hidden @ layer.fc2.weight.T + layer.fc2.bias).sigmoid()
    torch.testing.assert_close(layer(x), x * gate[:, None, None])
    torch.testing.assert_close(layer(x.flatten(1, 2)).view_as(x), layer(x))


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="window_size"):
        RelativePositionBias((2, 0), 2)
    with pytest.raises(ArgumentError, match="hidden_dim"):
        DynamicPositionBias(8, 2)
