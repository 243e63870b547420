"""Attention with shared queries against loops over windows; what it lets through from the whole image."""

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.global_context import GlobalQueryGenerator, GlobalWindowAttention, LocalWindowAttention


def test_every_window_is_asked_the_same() -> None:
    torch.manual_seed(0)
    layer = GlobalWindowAttention(8, 2, 2).double()
    torch.nn.init.normal_(layer.rel_pos.table)
    x, queries = torch.randn(2, 4, 6, 8).double(), torch.randn(2, 2, 4, 4).double()
    want = torch.zeros_like(x)
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for b in range(2):
        for y in range(0, 4, 2):
            for z in range(0, 6, 2):
                keys = [layer.qkv(x[b, y + dy, z + dx]).view(2, 2, 4) for dy, dx in places]
                for i, (dy, dx) in enumerate(places):
                    heads = []
                    for h in range(2):
                        scores = [
                            queries[b, h, i] @ keys[j][0, h] / 2
                            + layer.rel_pos.table[(dy - ey + 1) * 3 + dx - ex + 1, h]
                            for j, (ey, ex) in enumerate(places)
                        ]
                        weights = torch.stack(scores).softmax(0)
                        heads.append(sum(w * keys[j][1, h] for j, w in enumerate(weights)))
                    want[b, y + dy, z + dx] = layer.proj(torch.cat(heads))
    torch.testing.assert_close(layer(x, queries), want)


def test_queries_are_the_pooled_image() -> None:
    torch.manual_seed(0)
    generator = GlobalQueryGenerator(8, 2, 2, 1).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    conv = generator.convs[0]
    h = F.gelu(F.conv2d(x.movedim(-1, 1), conv.dwconv.weight, padding=1, groups=8)).movedim(1, -1)
    gate = (F.gelu(h.mean((1, 2)) @ conv.se.fc1.weight.T) @ conv.se.fc2.weight.T).sigmoid()
    f = x + (h * gate[:, None, None]) @ conv.proj.weight.T
    for i, (rows, columns) in enumerate([((0, 2), (0, 2)), ((0, 2), (1, 4)), ((1, 3), (0, 2)), ((1, 3), (1, 4))]):
        want = f[0, rows[0] : rows[1], columns[0] : columns[1]].amax((0, 1))
        torch.testing.assert_close(generator(x)[0, :, i].flatten(), want)
    assert len(GlobalQueryGenerator(8, 2, 2, 0).convs) == 1


def test_far_pixels_change_every_window_through_the_queries_only() -> None:
    torch.manual_seed(0)
    generator, attention, local = (
        GlobalQueryGenerator(8, 2, 2, 2),
        GlobalWindowAttention(8, 2, 2),
        LocalWindowAttention(8, 2, 2),
    )
    x = torch.randn(1, 8, 8, 8)
    other = x.clone()
    other[0, 0, 0] += 3
    changed = [
        ((f(x) - f(other)).abs().amax(-1)[0] > 1e-6).view(4, 2, 4, 2).any(3).any(1)
        for f in (lambda t: attention(t, generator(t)), lambda t: attention(t, generator(x)), local)
    ]
    assert changed[0].all()
    for alone in changed[1:]:
        assert alone[0, 0]
        assert alone.sum() == 1


def test_a_constant_image_has_equal_windows() -> None:
    torch.manual_seed(0)
    attention, x = GlobalWindowAttention(8, 2, 2), torch.ones(1, 4, 4, 8)
    y = attention(x, torch.randn(1, 2, 4, 4)).view(2, 2, 2, 2, 8)
    torch.testing.assert_close(y, y[:1, :, :1].expand_as(y))


def test_gradients() -> None:
    torch.manual_seed(0)
    layer = GlobalWindowAttention(4, 2, 2).double()
    generator = GlobalQueryGenerator(4, 2, 2, 1).double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x, queries))
    assert torch.autograd.gradcheck(lambda t: generator(t), (x,))


def test_refusals() -> None:
    layer = GlobalWindowAttention(8, 2, 2)
    with pytest.raises(ShapeError, match=r"q_global: expected \(1, 2, 4, 4\)"):
        layer(torch.randn(1, 4, 4, 8), torch.randn(2, 2, 4, 4))
    with pytest.raises(ShapeError, match="window_size"):
        layer(torch.randn(1, 4, 5, 8), torch.randn(1, 2, 4, 4))
    with pytest.raises(ShapeError, match="8 x 8 is 4 x 4 after 1 poolings, expected the window size 3"):
        GlobalQueryGenerator(8, 2, 3, 1)(torch.randn(1, 8, 8, 8))
    with pytest.raises(ArgumentError, match="num_downsamples"):
        GlobalQueryGenerator(8, 2, 3, -1)
    with pytest.raises(ArgumentError, match="input_resolution"):
        GlobalQueryGenerator.from_official(
            {}, dim=8, input_resolution=5, image_resolution=64, window_size=2, num_heads=2
        )
