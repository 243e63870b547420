"""OverLoCK: dynamic kernels against their definition, merged convolutions, sizes and costs."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError
from regard.layers.large_kernel import BRANCHES, LargeKernelConv
from regard.layers.response_norm import GlobalResponseNorm
from regard.mechanisms.grid.contmix import ContMix, dynamic_filter, window_bias
from regard.models.vision.overlock_blocks import ContMixBlock, Residual
from tests.models.vision.counts import gigamacs, millions


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0, 0.3)
    return module.eval()


def applied(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer without bias and its batch norm, of (..., C)."""
    bn = layer.bn
    return (x @ layer.conv.weight.T - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias


def pooled(c: torch.Tensor) -> torch.Tensor:
    """(H, W, C) to (49, C), cell by cell."""
    height, width, _ = c.shape
    cells = []
    for i in range(7):
        for j in range(7):
            rows, columns = (
                slice(i * height // 7, -(-(i + 1) * height // 7)),
                slice(j * width // 7, -(-(j + 1) * width // 7)),
            )
            cells.append(c[rows, columns].mean((0, 1)))
    return torch.stack(cells)


def naive(layer: ContMix, x: torch.Tensor, context: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One image (H, W, C), by the published order of operations."""
    height, width, dim = x.shape
    groups, small, large = layer.groups, layer.small_kernel_size, layer.kernel_size
    q, k = applied(layer.query, x) * (dim / groups) ** -0.5, applied(layer.key, pooled(context))
    v = applied(layer.value, values) if not isinstance(layer.value, torch.nn.Identity) else values
    out, d, c = torch.zeros_like(v), dim // 2 // groups, dim // 2 // groups
    for y in range(height):
        for z in range(width):
            for g in range(groups):
                affinity = k[:, g * d : (g + 1) * d] @ q[y, z, g * d : (g + 1) * d]
                logits = layer.kernel_proj(affinity)
                for half, size, table, part in (
                    (0, small, layer.small_bias, logits[: small**2]),
                    (1, large, layer.large_bias, logits[small**2 :]),
                ):
                    top = min(max(y - size // 2, 0), height - size)
                    left = min(max(z - size // 2, 0), width - size)
                    cells = [(top + a, left + b) for a in range(size) for b in range(size)]
                    bias = torch.stack([table[g, i - y + size - 1, j - z + size - 1] for i, j in cells])
                    weights = (part + bias).exp() / (part + bias).exp().sum()
                    channels = slice(half * dim // 2 + g * c, half * dim // 2 + (g + 1) * c)
                    out[y, z, channels] = sum(w * v[i, j, channels] for w, (i, j) in zip(weights, cells, strict=True))
    return applied(layer.proj, out)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (6, 5), (8, 9)])
def test_it_is_its_definition(height: int, width: int) -> None:
    layer = randomised(ContMix(8, 5, 3, num_heads=1)).double()
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([naive(layer, image, image, image) for image in x]))


def test_kernels_of_a_context_and_values_as_they_are() -> None:
    layer = randomised(ContMix(8, 3, 3, num_heads=2, context_dim=6, value_proj=False)).double()
    x, values = (torch.randn(1, 4, 5, 8, dtype=torch.float64) for _ in range(2))
    context = torch.randn(1, 9, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context, values)[0], naive(layer, x[0], context[0], values[0]))


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (1, 1), (2, 9), (4, 4)])
def test_small_images_are_enlarged(height: int, width: int) -> None:
    layer = randomised(ContMix(8, 5, 3, num_heads=1)).double()
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    short = min(height, width)
    size = (5, int(5 / height * width)) if height == short and height < width else (int(5 / width * height), 5)
    large = F.interpolate(x.movedim(-1, 1), size, mode="bilinear").movedim(1, -1)
    layer.proj, proj = torch.nn.Identity(), layer.proj
    inner = F.adaptive_avg_pool2d(layer(large).movedim(-1, 1), (height, width)).movedim(1, -1)
    want = proj(inner)
    layer.proj = proj
    got = layer(x)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want)


def test_kernels_sum_to_one_and_may_be_static() -> None:
    layer = randomised(ContMix(8, 5, 3, num_heads=2))
    x = torch.randn(2, 6, 7, 8)
    for kernels in layer.kernels(x):
        torch.testing.assert_close(kernels.sum(-1), torch.ones_like(kernels[..., 0]))
    with torch.no_grad():
        layer.kernel_proj.weight.zero_()
    small, large = layer.kernels(x)
    assert small.shape == (2, 4, 6, 7, 9)
    assert large.shape == (2, 4, 6, 7, 25)
    want = (layer.kernel_proj.bias[9:] + window_bias(layer.large_bias, 6, 7)).softmax(-1)
    torch.testing.assert_close(large, want.expand_as(large))
    torch.testing.assert_close(large[:, :, 2, 2], large[:, :, 3, 4])  # away from the borders, the same everywhere


def test_the_window_stays_inside() -> None:
    x = torch.arange(6.0).view(1, 1, 1, 6, 1).expand(1, 1, 3, 6, 1)
    first, last = torch.eye(9)[0], torch.eye(9)[8]
    for kernel, want in ((first, [0, 0, 1, 2, 3, 3]), (last, [2, 2, 3, 4, 5, 5])):
        got = dynamic_filter(x, kernel.expand(1, 1, 3, 6, 9))
        assert got[0, 0, 1, :, 0].tolist() == want


def test_wide_images_are_filtered_in_strips() -> None:
    torch.manual_seed(0)
    x, kernels = torch.randn(1, 2, 4, 150, 3), torch.randn(1, 2, 4, 150, 9)
    want = torch.zeros_like(x)
    for y in range(4):
        for z in range(150):
            top, left = min(max(y - 1, 0), 1), min(max(z - 1, 0), 147)
            want[:, :, y, z] = (
                kernels[:, :, y, z, :, None] * x[:, :, top : top + 3, left : left + 3].flatten(2, 3)
            ).sum(2)
    torch.testing.assert_close(dynamic_filter(x, kernels), want, atol=1e-5, rtol=1e-5)


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(1, 2, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dynamic_filter, (x, kernels))
    layer = randomised(ContMix(4, 3, 1, num_heads=1)).double()
    for grid in ((3, 4), (2, 3)):
        image = torch.randn(1, *grid, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (image,))


def test_kernels_know_what_lies_far_outside_their_window() -> None:
    layer = randomised(ContMix(8, 3, 3, num_heads=1))
    x = torch.randn(1, 21, 21, 8)
    other = x.clone()
    other[0, 20, 20] += 3
    changed = (layer.kernels(x)[1] - layer.kernels(other)[1]).abs().amax((1, 4))[0]
    assert changed[0, 0] > 1e-4
    block = randomised(ContMixBlock(8, 5, 3, num_heads=1))
    assert (block(x) - block(other))[0, 0, 0].abs().max() > 1e-4


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_marker_far_away_is_learned_by_dynamic_kernels_only(dynamic: bool) -> None:
    """The middle of a fixed image says which of two markers is in its corner."""
    torch.manual_seed(0)
    layer, read = ContMix(16, 3, 3, num_heads=1), torch.nn.Linear(16, 2)
    if not dynamic:
        torch.nn.init.zeros_(layer.kernel_proj.weight).requires_grad_(False)
    background, markers = torch.randn(9, 9, 16), 2 * torch.randn(2, 16)
    classes = torch.arange(16) % 2
    x = background.repeat(16, 1, 1, 1)
    x[:, 0, 0] = markers[classes]
    optimiser = torch.optim.Adam([p for p in (*layer.parameters(), *read.parameters()) if p.requires_grad], 0.02)
    for _ in range(60):
        loss = F.cross_entropy(read(layer(x)[:, 4, 4]), classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (loss < 0.1) if dynamic else (loss > 0.69)


def test_the_cost_is_linear_in_the_pixels() -> None:
    dim, cells = 16, 25 + 49
    counts = []
    for n in (8 * 8, 16 * 8):
        with torch.device("meta"):
            layer, x = ContMix(dim, 7, 5, num_heads=2).eval(), torch.empty(1, n // 8, 8, dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        projections = n * dim * (dim // 2 + 2 * dim) + 49 * dim * dim // 2
        kernels = 49 * cells * dim // 2 + n * cells * dim // 2
        filtering = n * 8 * (5 + 7) * dim // 2  # rows of windows, each as a band matrix of all 8 columns
        counts.append(counter.get_total_flops() / 2)
        assert counts[-1] == projections + kernels + filtering
    assert counts[1] < 2 * counts[0]


@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_merged_convolutions(kernel_size: int) -> None:
    layer = randomised(LargeKernelConv(3, kernel_size)).double()
    x = torch.randn(1, 9, 11, 3, dtype=torch.float64)
    want = layer(x)
    layer.merge()
    assert len(list(layer.parameters())) == 2
    torch.testing.assert_close(layer(x), want)
    layer.merge()
    torch.testing.assert_close(layer(x), want)


def test_response_norm() -> None:
    layer = randomised(GlobalResponseNorm(3)).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    for image, got in zip(x, layer(x), strict=True):
        norms = torch.stack([image[..., c].square().sum().sqrt() for c in range(3)])
        want = image * (layer.gamma * norms / (norms.mean() + 1e-6) + 1) + layer.beta
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shortcut", [False, True])
def test_residuals(shortcut: bool) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    scaled = randomised(Residual(3, 1.0, shortcut, 0.0))
    want = scaled.scale(x) + y if shortcut else x + scaled.scale(y)
    assert not torch.allclose(want, x + y)
    torch.testing.assert_close(scaled(x, y), want)
    torch.testing.assert_close(Residual(3, None, shortcut, 0.0)(x, y), x + y)


@pytest.mark.parametrize(
    ("name", "parameters", "merged"),
    [
        ("overlock-xt", 17_307_272, 16),
        ("overlock-t", 34_990_472, 33),
        ("overlock-s", 58_309_772, 56),
        ("overlock-b", 98_012_968, 95),
    ],
)
def test_published_sizes(name: str, parameters: int, merged: int) -> None:
    assert millions(name) * 1e6 == pytest.approx(parameters, abs=0.5)
    assert millions(name, merged=True, auxiliary=False) == pytest.approx(merged, abs=0.5)


@pytest.mark.parametrize(("name", "published"), [("overlock-xt", 2.6), ("overlock-t", 5.5), ("overlock-b", 16.7)])
def test_published_costs(name: str, published: float) -> None:
    """Of merged networks. S is published as 9.7, but costs 9.5 by the count that gives the others' numbers."""
    assert gigamacs(name, merged=True) == pytest.approx(published, rel=0.01, abs=0.05)


SMALL = {
    "num_classes": 3,
    "dims": (8, 8, 16, 16),
    "depths": (1, 1, 1, 1),
    "sub_depths": (2, 1),
    "kernel_sizes": (7, 5, 5, 5),
    "num_heads": (2, 1),
    "projection": 24,
}


def test_merged_networks_leave_the_logits(tmp_path) -> None:
    model = randomised(regard.create("overlock", **SMALL))
    images = torch.randn(1, 3, 70, 50)
    want = model(images)
    got = model.reparameterize()(images)
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(images), got)


def test_training_with_an_auxiliary_classifier() -> None:
    torch.manual_seed(0)
    model = regard.create("overlock", **SMALL, auxiliary=True).train()
    images = torch.randn(2, 3, 64, 64)
    got = model(images)
    assert {name: tuple(logits.shape) for name, logits in got.items()} == {"main": (2, 3), "aux": (2, 3)}
    (got["main"].square().sum() + got["aux"].square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert model.eval()(images).shape == (2, 3)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="kernel_size"):
        ContMix(8, 4)
    with pytest.raises(ArgumentError, match="small_kernel_size"):
        ContMix(8, 3, 5)
    with pytest.raises(ArgumentError, match="num_heads"):
        ContMix(8, num_heads=3)
    with pytest.raises(ShapeError, match="context: expected"):
        ContMix(8, context_dim=4)(torch.randn(1, 8, 8, 8))
    with pytest.raises(ShapeError, match="window"):
        dynamic_filter(torch.randn(1, 1, 2, 4, 1), torch.randn(1, 1, 2, 4, 9))
    with pytest.raises(ArgumentError, match="kernel_size"):
        LargeKernelConv(8, 3)
    with pytest.raises(ArgumentError, match="context_dim"):
        ContMixBlock(8, context_dim=-1)
    with pytest.raises(ArgumentError, match="num_heads"):
        regard.create("overlock", num_heads=(1,))
    with pytest.raises(ArgumentError, match="sub_depths"):
        regard.create("overlock", sub_depths=(0, 1))
