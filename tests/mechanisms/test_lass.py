"""SegMAN's mixer and its four-way scan against their equations, and what one position reaches."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.lass import LASS
from regard.mechanisms.grid.selective import SelectiveScan2d, cross_merge, cross_scan
from regard.probes import reach


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return module.double().eval()


def naive_scan(layer: SelectiveScan2d, x: Tensor) -> Tensor:
    """One image (H, W, C), pixel by pixel along each of the four paths."""
    height, width, dim = x.shape
    by_rows = [(i, j) for i in range(height) for j in range(width)]
    by_columns = [(i, j) for j in range(width) for i in range(height)]
    out = torch.zeros_like(x)
    for k, path in enumerate((by_rows, by_columns, by_rows[::-1], by_columns[::-1])):
        h = x.new_zeros(dim, layer.d_state)
        for place in path:
            low, b, c = (layer.x_proj[k] @ x[place]).split([layer.dt_rank, layer.d_state, layer.d_state])
            step = (1 + (layer.dt_proj[k] @ low + layer.dt_bias[k]).exp()).log()
            h = (-step[:, None] * layer.A_log[k].exp()).exp() * h + (step * x[place])[:, None] * b
            out[place] += h @ c + layer.D[k] * x[place]
    return out


@pytest.mark.parametrize(("height", "width", "dim", "d_state"), [(3, 4, 6, 1), (5, 2, 17, 3), (1, 3, 4, 1)])
def test_the_scan_is_its_recurrence(height: int, width: int, dim: int, d_state: int) -> None:
    layer = randomised(SelectiveScan2d(dim, d_state))
    assert layer.dt_rank == (2 if dim == 17 else 1)
    x = torch.randn(2, height, width, dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([naive_scan(layer, image) for image in x]))


def test_scan_and_merge_keep_places() -> None:
    x = torch.arange(12.0).view(1, 3, 4, 1)
    assert cross_scan(x)[0, :, :3, 0].tolist() == [[0, 1, 2], [0, 4, 8], [11, 10, 9], [11, 7, 3]]
    torch.testing.assert_close(cross_merge(cross_scan(x), 3, 4), 4 * x)


def naive_lass(layer: LASS, x: Tensor, table: Tensor | None) -> Tensor:
    """One image (H, W, C)."""
    height, width, dim = x.shape
    heads, d = layer.num_heads, layer.head_dim
    q, k, v = (t.view(height, width, heads, d) for t in layer.qkv(x).chunk(3, -1))

    def turned(t: Tensor) -> Tensor:
        """Channel m turns with channel m + d / 2, by the row for the first quarter and by the column for the next."""
        out, quarter = torch.empty_like(t), d // 4
        for m in range(d // 2):
            speed = 10_000.0 ** -((m % quarter) / max(1, quarter - 1))
            for i in range(height):
                for j in range(width):
                    angle = torch.tensor((i if m < quarter else j) * speed)
                    a, b = t[i, j, :, m], t[i, j, :, m + d // 2]
                    out[i, j, :, m] = a * angle.cos() - b * angle.sin()
                    out[i, j, :, m + d // 2] = b * angle.cos() + a * angle.sin()
        return out

    q, k = turned(q), turned(k)
    size, gap = layer.kernel_size, layer.dilation
    z = torch.empty(height, width, heads, d, dtype=x.dtype)

    def window(place: int, side: int) -> list[int]:
        """The size nearest of the places with the same remainder, all inside."""
        line = list(range(place % gap, side, gap))
        start = min(max(line.index(place) - size // 2, 0), len(line) - size)
        return line[start : start + size]

    for i in range(height):
        for j in range(width):
            keys = [(a, b) for a in window(i, height) for b in window(j, width)]
            for h in range(heads):
                scores = torch.stack([q[i, j, h] @ k[a, b, h] for a, b in keys]) / d**0.5
                if layer.rpb is not None:
                    offsets = [((a - i) // gap + size - 1, (b - j) // gap + size - 1) for a, b in keys]
                    scores = scores + torch.stack([layer.rpb[h, r, c] for r, c in offsets])
                weights = scores.softmax(0)
                z[i, j, h] = sum(w * v[a, b, h] for w, (a, b) in zip(weights, keys, strict=True))
    local = layer.lepe(v.reshape(1, height, width, dim))[0]
    if layer.global_mode:
        flat = [t.reshape(height * width, heads, d).transpose(0, 1) for t in (q, k, z)]
        scores = flat[0] @ flat[1].mT / d**0.5
        scores = scores if table is None else scores + table
        y = (scores.softmax(-1) @ flat[2]).transpose(0, 1).reshape(x.shape)
    else:
        z = z.reshape(x.shape)
        u = F.conv2d(z.movedim(-1, 0)[None], layer.dwconv.weight, layer.dwconv.bias, padding=1, groups=dim)
        bn = layer.bn
        u = F.batch_norm(u, bn.running_mean, bn.running_var, bn.weight, bn.bias)[0].movedim(0, -1)
        s = naive_scan(layer.ssm, u * u.sigmoid())
        centred = s - s.mean(-1, keepdim=True)
        s = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight + layer.norm.bias
        y = s + z
    return layer.proj(y + local)


@pytest.mark.parametrize(
    ("height", "width", "config"),
    [
        (5, 4, {"kernel_size": 3}),
        (3, 3, {"kernel_size": 3, "rel_pos_bias": False}),
        (5, 7, {"kernel_size": 5}),
        (7, 6, {"kernel_size": 3, "dilation": 2}),
        (5, 4, {"kernel_size": 3, "global_mode": True, "image_size": (5, 4)}),
        (4, 5, {"kernel_size": 1, "global_mode": True, "rel_pos_bias": False}),
    ],
)
def test_it_is_its_equation(height: int, width: int, config: dict) -> None:
    layer = randomised(LASS(16, 2, **config))
    x = torch.randn(2, height, width, 16, dtype=torch.float64)
    want = torch.stack([naive_lass(layer, image, layer.pair_bias) for image in x])
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)  # angles are float32


def test_tables_are_interpolated_to_other_grids() -> None:
    layer = randomised(LASS(8, 2, 3, global_mode=True, image_size=(4, 4)))
    assert layer.bias_of_pairs(2, 8) is layer.pair_bias
    table = layer.bias_of_pairs(5, 6)
    assert table.shape == (2, 30, 30)
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], naive_lass(layer, x[0], table), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.pair_bias.fill_(0.7)
    torch.testing.assert_close(layer.bias_of_pairs(5, 6), torch.full((2, 30, 30), 0.7, dtype=torch.float64))


def test_a_scan_reaches_everything_and_without_its_state_only_the_neighbourhood() -> None:
    layer = randomised(LASS(8, 2, 3)).float()
    x = torch.randn(1, 12, 13, 8)
    assert (reach(layer, x, (2, 6)) > 0).all()
    with torch.no_grad():
        layer.ssm.A_log.fill_(20.0)  # what was seen is forgotten at once
    near = torch.zeros(12, 13, dtype=torch.bool)
    near[0:5, 4:9] = True  # kernel 3, then the convolution of 3; the convolution of the values has 5
    assert (reach(layer, x, (2, 6)) > 0).equal(near)


def test_gradients() -> None:
    for layer in (
        randomised(LASS(4, 1, 3)),
        randomised(LASS(4, 1, 3, global_mode=True, image_size=3)),
    ):
        x = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
        parameters = dict(layer.named_parameters())

        def run(x: Tensor, *weights: Tensor, layer=layer, names=tuple(parameters)) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)
    scan = randomised(SelectiveScan2d(3, 2))
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scan, (x,))


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="kernel_size"):
        LASS(8, 2, 4)
    with pytest.raises(ArgumentError, match="dilation"):
        LASS(8, 2, 3, 0)
    with pytest.raises(ArgumentError, match="multiple of 4"):
        LASS(12, 2)
    with pytest.raises(ArgumentError, match="image_size"):
        LASS(8, 2, global_mode=True)
    with pytest.raises(ShapeError, match="sides of at least"):
        LASS(8, 2, 5)(torch.randn(1, 6, 4, 8))
    with pytest.raises(ShapeError, match="x: expected"):
        LASS(8, 2, 3)(torch.randn(1, 30, 8))
    with pytest.raises(ShapeError, match="x: expected"):
        SelectiveScan2d(8)(torch.randn(1, 3, 3, 4))
    with pytest.raises(ArgumentError, match="d_state"):
        SelectiveScan2d(8, 0)
    with pytest.raises(Unsupported, match="fused_na"):
        LASS.from_official({}, embed_dim=8, num_heads=2, window_size=3, fused_na=True)
    with pytest.raises(Unsupported, match="window_size"):
        LASS.from_official({}, embed_dim=8, num_heads=2, window_size=(3, 5))
    with pytest.raises(Unsupported, match="expansion_ratio"):
        SelectiveScan2d.from_official({}, d_model=8, expansion_ratio=2)
    with pytest.raises(ArgumentError, match=r"missing lepe\.weight"):
        LASS.from_official({}, embed_dim=8, num_heads=2, window_size=[3, 3])
