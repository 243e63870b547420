"""Agent attention and shifted windows on grids: window by window, against masks, gradients, refusals."""

import pytest
import torch

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, split_heads
from regard.mechanisms.grid.agent import GridAgentAttention
from regard.mechanisms.grid.shifted import ShiftedWindowAttention


@pytest.mark.parametrize("shift", [0, 1])
def test_every_window_has_its_own_agents(shift: int) -> None:
    torch.manual_seed(0)
    layer = GridAgentAttention(8, 2, (2, 3), num_agents=1, shift=shift).double()
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    want = torch.zeros_like(x)
    for b in range(2):
        for top in (0, 2):
            for left in (0, 3):
                cells = [((top + i + shift) % 4, (left + j + shift) % 6) for i in range(2) for j in range(3)]
                out = layer.agent(torch.stack([x[b, r, c] for r, c in cells])[None])[0]
                for (r, c), y in zip(cells, out, strict=True):
                    want[b, r, c] = y
    torch.testing.assert_close(layer(x), want)


def test_one_window_is_the_layer_for_sequences() -> None:
    torch.manual_seed(0)
    layer, x = GridAgentAttention(8, 2, 4, num_agents=4, kv_reduction=2), torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(layer(x), layer.agent(x.flatten(1, 2)).view_as(x))


@pytest.mark.parametrize(("grid", "window", "shift"), [((8, 8), 4, 2), ((6, 9), 3, 1), ((4, 8), 4, 3), ((4, 4), 2, 0)])
def test_shifted_windows_are_attention_under_their_mask(grid: tuple[int, int], window: int, shift: int) -> None:
    torch.manual_seed(0)
    layer = ShiftedWindowAttention(8, 2, window, shift).double()
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    offset = place[:, None] - place + window - 1  # of pairs further apart nothing is seen, whatever their bias
    offset = offset.clamp(0, 2 * window - 2)
    bias = layer.rel_pos.table.T[:, offset[..., 0] * (2 * window - 1) + offset[..., 1]]
    q, k, v = (split_heads(t, 2) for t in layer.qkv(x.flatten(1, 2)).chunk(3, -1))
    mask = masks.shifted_windows(grid, window, shift)
    want = layer.proj(merge_heads(attention(q, k, v, mask=mask, bias=bias, backend="reference")))
    torch.testing.assert_close(layer(x), want.view_as(x))


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ShiftedWindowAttention(4, 2, 2, 1).double(), (x,))
    assert torch.autograd.gradcheck(GridAgentAttention(4, 2, 2, num_agents=1, shift=1).double(), (x,))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="multiples of 4 and 4"):
        GridAgentAttention(8, 2, 4, num_agents=4)(torch.randn(1, 4, 6, 8))
    with pytest.raises(ArgumentError, match="window_size: expected one number or"):
        GridAgentAttention(8, 2, (4, 4, 4), num_agents=4)
    with pytest.raises(ArgumentError, match="num_agents"):
        GridAgentAttention(8, 2, 4, num_agents=3)
    with pytest.raises(ArgumentError, match="shift: expected 0 to 3, got 4"):
        ShiftedWindowAttention(8, 2, 4, 4)
    with pytest.raises(ShapeError, match="window_size"):
        ShiftedWindowAttention(8, 2, 4, 2)(torch.randn(1, 4, 6, 8))
