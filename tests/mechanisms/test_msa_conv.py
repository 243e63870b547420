"""MSA-Conv against unfolding and against single pixels; TiC's shift and pooling, and images of any size."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.attention.grid_plan import Axis, extent, tile_size
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.msa_conv import MSAConv2d, neighbourhood_dot, neighbourhood_sum
from regard.models.vision.tic import TiC, cyclic_shift, inter_pool


def unfolded(x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, D) to (B, H, W, heads, kh · kw, D), zeros beyond the border."""
    around = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    flat = F.unfold(x.flatten(-2).movedim(-1, 1), kernel, dilation, around)
    return flat.view(x.shape[0], *x.shape[3:], -1, *x.shape[1:3]).permute(0, 4, 5, 1, 3, 2)


def naive(layer: MSAConv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, attended), by unfolding."""
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)) for t in layer.qkv(x).chunk(3, -1))
    keys, values = (unfolded(t, layer.kernel_size, layer.dilation) for t in (k, v))
    scores = torch.einsum("...d,...td->...t", q, keys) * q.shape[-1] ** -0.5
    if layer.border == "mask":
        inside = unfolded(torch.ones_like(k[..., :1, :1]), layer.kernel_size, layer.dilation)[..., 0]
        scores = scores.masked_fill(inside == 0, -torch.inf)
    weights = scores.softmax(-1)
    return weights, torch.einsum("...t,...td->...d", weights, values).flatten(-2)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_heads": 2, "kernel_size": (5, 1), "dilation": 2},
        {"num_heads": 4, "dilation": (1, 3), "bias": True},
        {"border": "mask", "num_heads": 2, "dilation": 2},
        {"kernel_size": 7, "border": "mask"},
        {"kernel_size": (7, 9), "padding": 1, "stride": 2},
    ],
)
def test_it_is_its_definition(kwargs: dict) -> None:
    torch.manual_seed(0)
    layer = MSAConv2d(4, 6, **kwargs).double().eval()
    x = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    weights, attended = naive(layer, x)
    torch.testing.assert_close(layer.attend(x), attended)
    if layer.border == "zeros":
        torch.testing.assert_close(layer.weights(x), weights)
    z = (x + attended).movedim(-1, 1)
    padding = kwargs.get("padding", [n // 2 for n in layer.kernel_size])
    want = F.conv2d(z, layer.conv.weight, layer.conv.bias, kwargs.get("stride", 1), padding).relu().movedim(1, -1)
    torch.testing.assert_close(layer(x), want)


def test_its_two_operators() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 6, 2, 3).double().unbind()
    dots = neighbourhood_dot(q, k, (3, 5), (2, 1))
    keys, values = (unfolded(t, (3, 5), (2, 1)) for t in (k, v))
    torch.testing.assert_close(dots, torch.einsum("...d,...td->...t", q, keys))
    torch.testing.assert_close(
        neighbourhood_sum(dots, v, (3, 5), (2, 1)), torch.einsum("...t,...td->...d", dots, values)
    )


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_gradients(border: str) -> None:
    torch.manual_seed(0)
    layer = MSAConv2d(2, 3, num_heads=2, dilation=2, border=border).double().eval()
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.attend, (x,))
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_dropout_of_weights_is_only_for_training(border: str) -> None:
    torch.manual_seed(0)
    layer = MSAConv2d(4, 4, attn_drop=0.5, border=border)
    x = torch.randn(1, 5, 5, 4)
    assert not torch.allclose(layer.attend(x), layer.attend(x))
    mean = torch.stack([layer.attend(x) for _ in range(600)]).mean(0)
    torch.testing.assert_close(mean, layer.eval().attend(x), atol=0.15, rtol=0)


def test_without_queries_it_averages() -> None:
    torch.manual_seed(0)
    layer = MSAConv2d(4, 4).eval()
    torch.nn.init.zeros_(layer.qkv.weight[:4])
    torch.nn.init.zeros_(layer.qkv.bias[:4])
    x = torch.randn(1, 5, 6, 4)
    v = layer.qkv(x)[..., 8:].movedim(-1, 1)
    torch.testing.assert_close(layer.attend(x), F.avg_pool2d(v, 3, 1, 1).movedim(1, -1))


def test_one_layer_serves_all_sizes_alike() -> None:
    torch.manual_seed(0)
    layer = MSAConv2d(4, 4).eval()
    large = torch.randn(1, 64, 64, 4)
    want = layer(large)[:, 3:10, 3:10]
    for height, width in ((16, 16), (23, 31)):
        torch.testing.assert_close(layer(large[:, :height, :width])[:, 3:10, 3:10], want)


def test_the_work_per_pixel_does_not_depend_on_the_size() -> None:
    for n in (32, 64, 128, 256):
        axes = (Axis(n, 3, border="pad"), Axis(n, 3, border="pad"))
        cuts = [extent(axis, size) for axis, size in zip(axes, tile_size(axes, 4), strict=True)]
        assert math.prod(cut.tiles * cut.queries * cut.keys for cut in cuts) / n**2 < 100  # computed keys, 9 are seen


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_size": 4}, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"num_heads": 3}, "num_heads"),
        ({"dilation": 0}, "dilation"),
        ({"border": "wrap"}, "border"),
        ({"attn_drop": 2.0}, "attn_drop"),
        ({"padding": -1}, "padding"),
    ],
)
def test_refused_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MSAConv2d(4, 4, **kwargs)


def test_refused_shapes() -> None:
    with pytest.raises(ShapeError, match="x"):
        MSAConv2d(4, 4)(torch.zeros(1, 5, 5, 3))


def test_the_shift_goes_four_ways_and_back() -> None:
    x = torch.zeros(1, 5, 5, 8)
    x[0, 2, 2] = 1
    places = [cyclic_shift(x, 2)[0, ..., c].nonzero().flatten().tolist() for c in (0, 2, 4, 6)]
    assert places == [[4, 2], [0, 2], [2, 4], [2, 0]]
    torch.testing.assert_close(cyclic_shift(cyclic_shift(x, 2), 2, back=True), x)


def test_pooling_keeps_what_is_constant() -> None:
    x = torch.ones(1, 5, 4, 2)
    for stride, shape in ((1, (1, 5, 4, 2)), (2, (1, 3, 2, 2))):
        assert torch.equal(inter_pool(x, stride), torch.ones(shape))
    row = torch.arange(3.0).view(1, 1, 3, 1)
    assert inter_pool(row, 1).flatten().tolist() == [0.5, 1.5, 2.0]
    assert inter_pool(row, 2).flatten().tolist() == [0.5, 2.0]


@pytest.mark.parametrize("inter_pooling", [True, False])
def test_the_network_takes_any_size(inter_pooling: bool) -> None:
    torch.manual_seed(0)
    model = TiC(3, 1, dims=(4, 8), depths=(2, 1), num_heads=(1, 2), inter_pooling=inter_pooling).eval()
    for height, width in ((8, 8), (45, 33)):
        images = torch.randn(2, 1, height, width)
        assert model(images).shape == (2, 3)
    assert [tuple(f.shape) for f in model.forward_features(images)] == [(2, 12, 9, 4), (2, 6, 5, 8)]


def test_the_shift_widens_what_is_seen() -> None:
    reached = []
    for shift in (0, 3):
        torch.manual_seed(0)
        model = TiC(1, 1, dims=(8,), depths=(2,), shift=shift, inter_pooling=False).eval()
        images = torch.randn(1, 1, 68, 68, requires_grad=True)
        grad = torch.autograd.grad(model.forward_features(images)[0][0, 8, 8].sum(), images)[0]
        reached.append(int((grad != 0).sum()))
    assert reached[1] > reached[0]


def test_arguments_of_the_network() -> None:
    for kwargs, message in (
        ({"depths": (1,)}, "depths"),
        ({"num_heads": (1, 2)}, "num_heads"),
        ({"shift": -1}, "shift"),
    ):
        with pytest.raises(ArgumentError, match=message):
            TiC(**kwargs)
    assert isinstance(regard.create("tic-msa-conv/model", dims=(4,), depths=(1,)), TiC)
