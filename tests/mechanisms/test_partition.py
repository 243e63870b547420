"""Block and grid attention against dense attention under their patterns."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.partition import BlockAttention, GridAttention, PartitionAttention, block_mask, grid_mask

LAYERS = [(BlockAttention, block_mask), (GridAttention, grid_mask)]


def dense(layer: PartitionAttention, x: torch.Tensor, mask: torch.Tensor, step: tuple[int, int]) -> torch.Tensor:
    """Pair by pair over the whole image; ``step`` is what a table entry means in pixels."""
    b, h, w, c = x.shape
    q, k, v = layer.qkv(x.flatten(1, 2)).view(b, h * w, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = torch.full((b, layer.num_heads, h * w, h * w), -torch.inf, dtype=x.dtype)
    width = 2 * layer.size[1] - 1
    for i, j in mask.nonzero().tolist():
        dy, dx = (i // w - j // w) // step[0], (i % w - j % w) // step[1]
        bias = layer.rel_pos.table[(dy + layer.size[0] - 1) * width + dx + layer.size[1] - 1]
        scores[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) * (c / layer.num_heads) ** -0.5 + bias
    return layer.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, h, w, c))


@pytest.mark.parametrize(("cls", "pattern"), LAYERS)
@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 2), (3, 4, (3, 2)), (2, 9, (1, 3)), (1, 1, 1)])
def test_it_is_dense_attention_under_its_mask(cls, pattern, height, width, size) -> None:
    torch.manual_seed(0)
    layer = cls(8, 2, size).double()
    torch.nn.init.normal_(layer.rel_pos.table)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    mask = pattern((height, width), size).dense(height * width, height * width).view(height * width, -1)
    step = (1, 1) if cls is BlockAttention else (height // layer.size[0], width // layer.size[1])
    torch.testing.assert_close(layer(x), dense(layer, x, mask, step))


def test_the_patterns_in_words() -> None:
    """The definitions of the paper, on a grid of 4 x 6 with windows of 2 x 3."""
    near, far = block_mask((4, 6), (2, 3)), grid_mask((4, 6), (2, 3))
    for q in range(24):
        for k in range(24):
            (y, x), (v, u) = divmod(q, 6), divmod(k, 6)
            pair = torch.tensor(q), torch.tensor(k)
            assert bool(near(0, 0, *pair)) == ((y // 2, x // 3) == (v // 2, u // 3))
            assert bool(far(0, 0, *pair)) == ((y % 2, x % 2) == (v % 2, u % 2))


def test_windows_see_neighbours_and_both_layers_together_see_everything() -> None:
    torch.manual_seed(0)
    block, grid = BlockAttention(4, 1, 3), GridAttention(4, 1, 3)
    x = torch.randn(1, 9, 9, 4, requires_grad=True)  # 9 = P G, the largest image for which two layers suffice
    for layers, seen in (((block,), 9), ((grid,), 9), ((block, grid), 81)):
        y = x
        for layer in layers:
            y = layer(y)
        gradient = torch.autograd.grad(y[0, 4, 4].sum(), x)[0]
        assert int((gradient[0].abs().amax(-1) > 0).sum()) == seen


@pytest.mark.parametrize("cls", [BlockAttention, GridAttention])
def test_gradients(cls) -> None:
    torch.manual_seed(0)
    layer = cls(4, 2, (2, 1)).double()
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_cost_is_linear_in_the_image() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        layer = BlockAttention(32, 1)
        counts = []
        for side in (56, 224):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(torch.empty(1, side, side, 32))
            counts.append(counter.get_total_flops())
    assert counts[1] == 16 * counts[0]


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"window_size: \(3, 3\) does not divide the grid \(4, 6\)"):
        BlockAttention(4, 1, 3)(torch.randn(1, 4, 6, 4))
    with pytest.raises(ShapeError, match=r"grid_size: \(4, 4\) does not divide the grid \(4, 6\)"):
        grid_mask((4, 6), 4)
    with pytest.raises(ShapeError, match="x: expected"):
        GridAttention(4, 1, 2)(torch.randn(1, 4, 4, 5))
    with pytest.raises(ArgumentError, match="grid_size"):
        GridAttention(4, 1, (2, 2, 2))
    with pytest.raises(ArgumentError, match="num_heads"):
        BlockAttention(4, 3, 2)
