"""Channel attention and plain window attention against loops; how far each of them sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.channel import ChannelAttention
from regard.mechanisms.grid.window import WindowAttention2d


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_is_its_sums(dynamic: bool, tokens: int) -> None:
    torch.manual_seed(0)
    layer = ChannelAttention(6, 2, dynamic_scale=dynamic).double()
    x = torch.randn(1, tokens, 6, dtype=torch.float64)
    q, k, v = (t.view(tokens, 2, 3) for t in layer.qkv(x)[0].chunk(3, -1))
    left, right, mixed, scale = (q, k, v, tokens**-0.5) if dynamic else (k, v, q, 3**-0.5)
    out = torch.zeros(tokens, 2, 3, dtype=torch.float64)
    for g in range(2):
        for i in range(3):
            scores = [scale * sum(left[n, g, i] * right[n, g, j] for n in range(tokens)) for j in range(3)]
            weights = torch.stack(scores).softmax(0)
            for n in range(tokens):
                out[n, g, i] = sum(weights[j] * mixed[n, g, j] for j in range(3))
    torch.testing.assert_close(layer(x)[0], layer.proj(out.flatten(1)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_have_no_order_and_all_see_all(dynamic: bool) -> None:
    torch.manual_seed(0)
    layer = ChannelAttention(8, 2, dynamic_scale=dynamic).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    gradient = torch.autograd.grad(layer(x)[0, 4].sum(), x)[0]
    assert (gradient[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_padding_counts_for_nothing(dynamic: bool) -> None:
    torch.manual_seed(0)
    layer = ChannelAttention(8, 2, dynamic_scale=dynamic).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    y = layer(x, valid=valid)
    torch.testing.assert_close(y[0, :4], layer(x[:1, :4])[0])
    torch.testing.assert_close(y[1], layer(x[1:])[0])


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 2), (5, 7, 3), (2, 2, 4)])
def test_windows_filled_with_zeros(height: int, width: int, size: int) -> None:
    torch.manual_seed(0)
    layer = WindowAttention2d(8, 2, size).double()
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    got = layer(x)
    for y in range(height):
        for z in range(width):
            top, left = y // size * size, z // size * size
            window = torch.zeros(size, size, 8, dtype=torch.float64)
            inside = x[0, top : top + size, left : left + size]
            window[: inside.shape[0], : inside.shape[1]] = inside
            _, k, v = layer.qkv(window.flatten(0, 1)).view(size * size, 3, 2, 4).unbind(1)
            q = layer.qkv(x[0, y, z]).view(3, 2, 4)[0]
            weights = (torch.einsum("hd,nhd->hn", q, k) / 2).softmax(-1)
            torch.testing.assert_close(got[0, y, z], layer.proj(torch.einsum("hn,nhd->hd", weights, v).flatten()))


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    for dynamic in (False, True):
        assert torch.autograd.gradcheck(ChannelAttention(4, 2, dynamic_scale=dynamic).double(), (x,))
    grid = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(WindowAttention2d(4, 2, 2).double(), (grid,))


def test_cost_is_linear_in_the_image() -> None:
    with torch.device("meta"):
        layer, counts = ChannelAttention(96, 3), []
        for side in (28, 224):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(torch.empty(1, side**2, 96))
            counts.append(counter.get_total_flops())
    assert counts[1] == 64 * counts[0] == 2 * 224**2 * (2 * 96 * 32 + 4 * 96**2)


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="takes no context"):
        ChannelAttention(8, 2)(torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    with pytest.raises(ArgumentError, match="num_heads"):
        ChannelAttention(8, 3)
    with pytest.raises(ArgumentError, match="window_size"):
        WindowAttention2d(8, 2, 0)
    with pytest.raises(ShapeError, match="x: expected"):
        WindowAttention2d(8, 2)(torch.randn(1, 4, 8))
