"""Factorization self-attention against loops over windows, cells and tokens; how far it sees."""

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.factorization import FactorizationAttention, WindowSummary
from regard.mechanisms.grid.window import WindowAttention2d


def reflected(index: int, side: int) -> int:
    return index if index < side else 2 * (side - 1) - index


def naive_summary(part: WindowSummary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (heads, L², c) of one image (H, W, C_i)."""
    height, width, channels = x.shape
    size, span, c = part.window_size, part.dilation * (part.window_size - 1) + 1, channels // part.num_heads
    rows, columns = -(-height // span), -(-width // span)
    heads = []
    for h in range(part.num_heads):
        cells = []
        for y in range(size):
            for z in range(size):
                windows = []
                for m in range(rows):
                    for w in range(columns):
                        place = m * span + y * part.dilation, w * span + z * part.dilation
                        token = x[reflected(place[0], height), reflected(place[1], width)]
                        windows.append(token[h * c : (h + 1) * c])
                if part.pool == "windows":
                    cells.append(torch.stack(windows).mean(0))
                else:
                    row, count = torch.cat(windows), len(windows)
                    cells.append(torch.stack([row[j * count : (j + 1) * count].mean() for j in range(c)]))
        heads.append(part.kv(part.fc(torch.stack(cells))))
    k, v = torch.stack(heads).split(c, -1)
    image = v.transpose(1, 2).reshape(1, channels, size, size)
    local = F.conv2d(image, part.local.weight, part.local.bias, padding=1, groups=channels)
    return k, v + local.view(part.num_heads, c, size * size).transpose(1, 2)


def naive(layer: FactorizationAttention, x: torch.Tensor) -> torch.Tensor:
    """One image (H, W, C)."""
    height, width, _ = x.shape
    whole, *groups = layer.widths
    r, q = layer.sr_ratio, layer.q(x)
    reduced = F.conv2d(x[..., :whole].movedim(-1, 0)[None], layer.sr.weight, layer.sr.bias, stride=r)
    k, v = layer.kv(layer.norm(reduced[0].movedim(0, -1))).split(whole, -1)
    v = v + F.conv2d(v.movedim(-1, 0), layer.local.weight, layer.local.bias, padding=1, groups=whole).movedim(0, -1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    conv, point = layer.source
    rest = x[..., whole:].movedim(-1, 0)
    source = point(F.conv2d(rest, conv.weight, conv.bias, padding=1, groups=len(rest)).movedim(0, -1))
    summaries = [naive_summary(s, t) for s, t in zip(layer.summaries, source.split(groups, -1), strict=True)]
    out = torch.zeros_like(x)
    for y in range(height):
        for z in range(width):
            outs = [(k @ q[y, z, :whole] * whole**-0.5).softmax(0) @ v]
            queries = q[y, z, whole:].view(layer.num_heads, -1)
            start = 0
            for (keys, values), group in zip(summaries, groups, strict=True):
                c = group // layer.num_heads
                part = queries[:, start : start + c]
                start += c
                heads = [(keys[h] @ part[h] * c**-0.5).softmax(0) @ values[h] for h in range(layer.num_heads)]
                outs.append(torch.cat(heads))
            out[y, z] = layer.proj(torch.cat(outs))
    return out


@pytest.mark.parametrize("pool", ["channels", "windows"])
@pytest.mark.parametrize(
    ("dim", "heads", "ratio", "size", "height", "width"),
    [(32, 2, 2, 2, 4, 7), (16, 1, 1, 3, 5, 6), (32, 1, 3, 2, 6, 5)],
)
def test_it_is_its_definition(pool: str, dim: int, heads: int, ratio: int, size: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    layer = FactorizationAttention(dim, heads, ratio, size, window_pool=pool).double()
    x = torch.randn(2, height, width, dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([naive(layer, image) for image in x]))


def test_pooling_differs_unless_there_is_one_window() -> None:
    torch.manual_seed(0)
    published = FactorizationAttention(16, 2, 1, 3, window_pool="channels")
    meant = FactorizationAttention(16, 2, 1, 3, window_pool="windows")
    meant.load_state_dict(published.state_dict())
    one, four = torch.randn(1, 3, 3, 16), torch.randn(1, 6, 6, 16)
    torch.testing.assert_close(published(one), meant(one))
    assert (published(four) - meant(four)).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [1, 2])
def test_every_token_sees_the_whole_image_and_a_window_does_not(ratio: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 32, requires_grad=True)
    for layer, seen in ((FactorizationAttention(32, 2, ratio, 4), 64), (WindowAttention2d(32, 2, 4), 16)):
        gradient = torch.autograd.grad(layer(x)[0, 2, 5].sum(), x)[0]
        assert int((gradient[0].abs().amax(-1) > 0).sum()) == seen


@pytest.mark.parametrize("pool", ["channels", "windows"])
def test_gradients(pool: str) -> None:
    torch.manual_seed(0)
    layer = FactorizationAttention(16, 1, 2, 2, window_pool=pool).double()
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="window_pool"):
        FactorizationAttention(16, 1, window_pool="max")
    with pytest.raises(ArgumentError, match="dim: expected a multiple of 16"):
        FactorizationAttention(24, 1, 2)
    with pytest.raises(ArgumentError, match="num_heads: 4 heads do not divide the 14 channels"):
        FactorizationAttention(32, 4, 2)
    with pytest.raises(ArgumentError, match="sr_ratio"):
        FactorizationAttention(32, 2, 0)
    layer = FactorizationAttention(32, 2, 2, 3)
    with pytest.raises(ShapeError, match="cannot be filled up by reflection to windows of 5 tokens"):
        layer(torch.randn(1, 2, 10, 32))
    with pytest.raises(ShapeError, match="at least 2 rows"):
        layer(torch.randn(1, 1, 10, 32))
    with pytest.raises(ShapeError, match="x: expected"):
        layer(torch.randn(1, 10, 32))
