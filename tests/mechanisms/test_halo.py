"""Halo attention pixel by pixel from the paper's equations; its special cases, strides and borders."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regard import masks
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.halo import HaloAttention, make_divisible


def naive(layer: HaloAttention, x: Tensor) -> Tensor:
    """Query by query, before any pooling."""
    b, h, n, d = layer.block_size, layer.halo_size, layer.num_heads, layer.head_dim
    w, step = b + 2 * h, layer.query_stride
    batch, height, width, _ = x.shape
    out = x.new_zeros(batch, height // step, width // step, layer.dim_out)
    for item in range(batch):
        for y in range(0, height, step):
            for z in range(0, width, step):
                q = layer.q(x[item, y, z]).view(n, d)
                top, left = y // b * b - h, z // b * b - h
                i, j = (y % b) // step, (z % b) // step  # the published tables count kept queries
                scores, values = [], []
                for p in range(w):
                    for r in range(w):
                        row, column = top + p, left + r
                        inside = 0 <= row < height and 0 <= column < width
                        if not inside and layer.pad == "mask":
                            continue
                        size = n * d + layer.dim_out
                        kv = layer.kv(x[item, row, column]) if inside else x.new_zeros(size)
                        k, v = kv.view(n, -1).split((d, layer.dim_out // n), -1)
                        position = q @ (layer.height_rel[p - i + w - 1] + layer.width_rel[r - j + w - 1])
                        score = (q * k).sum(-1) * d**-0.5
                        scores.append(score + position * (d**-0.5 if layer.scale_pos_embed else 1))
                        values.append(v)
                weights = torch.stack(scores).softmax(0)
                out[item, y // step, z // step] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return out


@pytest.mark.parametrize(
    "kwargs",
    [
        {"block_size": 2, "halo_size": 1},
        {"block_size": 2, "halo_size": 3, "pad": "mask", "dim_out": 12},
        {"block_size": 4, "halo_size": 1, "stride": 2, "qkv_bias": True},
        {"block_size": 2, "halo_size": 0, "head_dim": 5},
        {"block_size": 1, "halo_size": 2, "scale_pos_embed": True},
        {"block_size": 4, "halo_size": 2, "stride": 2, "pad": "mask", "qk_ratio": 2.0},
    ],
)
def test_it_is_its_definition(kwargs: dict) -> None:
    torch.manual_seed(0)
    layer = HaloAttention(8, num_heads=2, **kwargs).double()
    x = torch.randn(1, 8, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x))


def test_strides_that_average() -> None:
    torch.manual_seed(0)
    for block, avg_down in ((3, False), (2, True)):
        layer = HaloAttention(8, num_heads=2, stride=2, block_size=block, halo_size=1, avg_down=avg_down).double()
        x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
        want = F.avg_pool2d(naive(layer, x).movedim(-1, 1), 2).movedim(1, -1)
        torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("pad", ["zeros", "mask"])
def test_gradients(pad: str) -> None:
    torch.manual_seed(0)
    layer = HaloAttention(4, num_heads=2, head_dim=1, block_size=2, halo_size=1, pad=pad).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, (x, *parameters))


def test_what_a_block_sees_is_the_halo_mask() -> None:
    torch.manual_seed(0)
    layer = HaloAttention(4, num_heads=1, block_size=2, halo_size=1)
    x = torch.randn(1, 6, 8, 4, requires_grad=True)
    mask = masks.halo((6, 8), 2, 1).dense(48)
    for query in (0, 13, 30):
        grad = torch.autograd.grad(layer(x).flatten(1, 2)[0, query].sum(), x)[0]
        assert torch.equal(grad[0].flatten(0, 1).abs().amax(-1) > 0, mask[query])


def test_without_halo_and_tables_it_is_window_attention() -> None:
    torch.manual_seed(0)
    layer = HaloAttention(8, num_heads=2, block_size=4, halo_size=0)
    torch.nn.init.zeros_(layer.height_rel)
    torch.nn.init.zeros_(layer.width_rel)
    x = torch.randn(2, 8, 4, 8)
    flat = x.view(2, 32, 8)
    q = layer.q(flat).view(2, 32, 2, 4).transpose(1, 2)
    k, v = layer.kv(flat).view(2, 32, 2, 8).transpose(1, 2).chunk(2, -1)
    want = F.scaled_dot_product_attention(q, k, v, masks.windows((8, 4), 4).dense(32))
    torch.testing.assert_close(layer(x), want.transpose(1, 2).reshape(2, 8, 4, 8))


def test_it_moves_with_the_image_by_whole_blocks_only() -> None:
    torch.manual_seed(0)
    layer = HaloAttention(8, num_heads=2, block_size=2, halo_size=1)
    x = torch.randn(1, 12, 12, 8)
    inside = (slice(None), slice(4, -4), slice(4, -4))
    by_block, by_one = (layer(x.roll((n, n), (1, 2))).roll((-n, -n), (1, 2)) for n in (2, 1))
    torch.testing.assert_close(by_block[inside], layer(x)[inside])
    assert (by_one[inside] - layer(x)[inside]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"stride": 3}, "stride"),
        ({"block_size": 0}, "block_size"),
        ({"halo_size": -1}, "halo_size"),
        ({"pad": "reflect"}, "pad"),
    ],
)
def test_refused_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        HaloAttention(8, **{"num_heads": 2} | kwargs)


def test_refused_shapes() -> None:
    layer = HaloAttention(8, num_heads=2, block_size=4)
    for shape in ((1, 8, 6, 8), (1, 8, 8, 7), (8, 8, 8)):
        with pytest.raises(ShapeError, match="block_size 4"):
            layer(torch.zeros(shape))


def test_rounding() -> None:
    assert [make_divisible(n) for n in (3, 12, 20, 30.4, 64)] == [8, 16, 24, 32, 64]
    assert make_divisible(11.9) == 16  # 8 would take away more than a tenth
