"""ELA against its definition, its symmetry, and inserted into networks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.efficient_local import ChannelsFirst, EfficientLocalAttention, insert_ela


def layer(*args: int, **config: object) -> EfficientLocalAttention:
    torch.manual_seed(0)
    made = EfficientLocalAttention(*args, **config).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def gate(made: EfficientLocalAttention, profile: torch.Tensor) -> torch.Tensor:
    """(N, C) to the same, number by number."""
    length, dim = profile.shape
    weight, groups = made.conv.weight, made.conv.groups
    inside, taps = dim // groups, weight.shape[2]
    z = torch.zeros(length, dim, dtype=profile.dtype)
    for i in range(length):
        for c in range(dim):
            for other in range(inside):
                for tap in range(taps):
                    at = i + tap - taps // 2
                    if 0 <= at < length:
                        z[i, c] += weight[c, other, tap] * profile[at, c // inside * inside + other]
    size = dim // made.norm.num_groups
    for g in range(made.norm.num_groups):
        part = z[:, g * size : (g + 1) * size]
        mean = part.sum() / part.numel()
        variance = ((part - mean) ** 2).sum() / part.numel()
        z[:, g * size : (g + 1) * size] = (part - mean) / (variance + 1e-5).sqrt()
    return 1 / (1 + (-(z * made.norm.weight + made.norm.bias)).exp())


@pytest.mark.parametrize(("height", "width"), [(4, 6), (1, 3), (1, 1), (5, 2)])
@pytest.mark.parametrize("conv_groups", ["depthwise", 2, 1])
def test_it_is_its_definition(height: int, width: int, conv_groups: int | str) -> None:
    made = layer(4, 3, conv_groups, 2)
    x = torch.randn(2, height, width, 4, dtype=torch.float64)
    for image, got, rows, columns in zip(x, made(x), *made.gates(x), strict=True):
        row = torch.stack([image[y].sum(0) / width for y in range(height)])
        column = torch.stack([image[:, z].sum(0) / height for z in range(width)])
        want_rows, want_columns = gate(made, row), gate(made, column)
        torch.testing.assert_close(rows[:, 0], want_rows, atol=1e-6, rtol=0)
        torch.testing.assert_close(columns[0], want_columns, atol=1e-6, rtol=0)
        want = image * want_rows[:, None] * want_columns[None]
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_gradients() -> None:
    made = layer(4, 3, 2, 2, scale_init=4.0)
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))


def test_turning_the_image_turns_the_output() -> None:
    made = layer(4, 3, 2, 2)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(made(x.transpose(1, 2)), made(x).transpose(1, 2))


def test_one_token_and_one_channel_per_group_leave_the_bias() -> None:
    made = layer(4, 3, norm_groups=4)
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    for gates in made.gates(x):
        torch.testing.assert_close(gates.flatten(), made.norm.bias.sigmoid())


def test_gates_follow_a_blob() -> None:
    made = EfficientLocalAttention(8, 5, norm_groups=1)
    nn.init.ones_(made.conv.weight)  # a box filter
    with torch.no_grad():
        made.conv.weight[:, :, [0, 4]] = 0.5
        made.conv.weight[:, :, 2] = 2
    for y, z in ((3, 10), (8, 2), (6, 6)):
        x = torch.zeros(1, 12, 13, 8)
        x[0, y, z] = 1
        rows, columns = made.gates(x)
        assert rows[0, :, 0].argmax(0).unique().tolist() == [y]
        assert columns[0, 0].argmax(0).unique().tolist() == [z]


def test_it_starts_at_a_quarter_or_near_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.ones(2, 8, 8, 32)  # profiles are flat up to the borders
    x[:, ::2] += 0.1 * torch.randn(2, 4, 8, 32)
    assert EfficientLocalAttention(32)(x).mean().item() == pytest.approx(0.25, abs=0.05)
    assert EfficientLocalAttention(32, scale_init=4.0)(x).mean().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("version", "kernel", "group", "norm"), [("t", 5, 1, 32), ("b", 7, 1, 16), ("s", 5, 8, 16), ("l", 7, 8, 16)]
)
def test_versions(version: str, kernel: int, group: int, norm: int) -> None:
    made = EfficientLocalAttention(64, version=version)
    assert made.conv.weight.shape == (64, group, kernel)
    assert made.norm.num_groups == norm
    assert sum(p.numel() for p in made.parameters()) == 64 * group * kernel + 2 * 64


def test_weights_of_ports() -> None:
    made = layer(32, 5, 4, 8).float()
    state = {"conv.weight": made.conv.weight, "gn.weight": made.norm.weight, "gn.bias": made.norm.bias}
    loaded = regard.from_official("ela", state, norm_groups=8)
    x = torch.randn(1, 4, 4, 32)
    torch.testing.assert_close(loaded(x), made(x), atol=0, rtol=0)


class Bottleneck(nn.Module):
    """As in torchvision, with another width inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2)
        self.conv2, self.bn2 = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, bias=False), nn.BatchNorm2d(dim // 2)
        self.conv3, self.bn3 = nn.Conv2d(dim // 2, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.bn3(self.conv3(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.branch(x)).relu()


class InvertedResidual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.use_res_connect = True
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), nn.ReLU6()),
            nn.Sequential(
                nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False),
                nn.BatchNorm2d(2 * dim),
                nn.ReLU6(),
            ),
            nn.Conv2d(2 * dim, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_in_bottlenecks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), Bottleneck(32), Bottleneck(32)).eval()
    x = torch.randn(2, 3, 9, 9)
    hidden = model[0](x)
    plain = model[1].branch(hidden)
    assert insert_ela(model, version="b") is model
    layers = [m for m in model.modules() if isinstance(m, EfficientLocalAttention)]
    assert [m.dim for m in layers] == [32, 32]
    want = (hidden + ChannelsFirst(layers[0])(plain)).relu()
    torch.testing.assert_close(model[1](hidden), want)
    assert model(x).shape == (2, 32, 7, 7)


def test_in_inverted_residuals() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(InvertedResidual(16)).eval()
    x = torch.randn(2, 16, 5, 5)
    expand, depthwise, project, norm = model[0].conv
    inner = depthwise(expand(x))
    insert_ela(model, "inverted", kernel_size=5)
    (made,) = (m for m in model.modules() if isinstance(m, EfficientLocalAttention))
    assert made.dim == 32
    torch.testing.assert_close(model(x), x + norm(project(ChannelsFirst(made)(inner))))


def test_the_overhead_in_a_resnet_is_small() -> None:
    total = 0.0
    for dim, side, blocks in ((256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3)):  # ResNet-50 at 224²
        with torch.device("meta"):
            made, x = EfficientLocalAttention(dim, version="l"), torch.empty(1, side, side, dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(x)
        assert counter.get_total_flops() / 2 == 7 * 8 * dim * 2 * side
        total += blocks * (counter.get_total_flops() / 2 + 2 * dim * side**2)
    assert total < 0.02 * 4.1e9


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="norm_groups"):
        EfficientLocalAttention(24)
    assert EfficientLocalAttention(24, fit_groups=True).norm.num_groups == 8
    with pytest.raises(ArgumentError, match="kernel_size"):
        EfficientLocalAttention(32, 4)
    with pytest.raises(ArgumentError, match="conv_groups"):
        EfficientLocalAttention(32, conv_groups=5)
    with pytest.raises(ArgumentError, match="conv_groups"):
        EfficientLocalAttention(32, conv_groups="wide")
    with pytest.raises(ArgumentError, match="version"):
        EfficientLocalAttention(32, version="x")
    with pytest.raises(ArgumentError, match="dim"):
        EfficientLocalAttention(36, version="s")
    with pytest.raises(ShapeError, match="x: expected"):
        EfficientLocalAttention(32)(torch.randn(1, 32, 4, 4))
    with pytest.raises(ArgumentError, match="where"):
        insert_ela(nn.Linear(2, 2), "after")
    with pytest.raises(ArgumentError, match="bottleneck"):
        insert_ela(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="state_dict"):
        EfficientLocalAttention.from_official({})


def test_inserting_fails_before_anything_changes() -> None:
    model = nn.Sequential(Bottleneck(32), Bottleneck(24))
    with pytest.raises(ArgumentError, match="norm_groups"):
        insert_ela(model)
    assert not [m for m in model.modules() if isinstance(m, EfficientLocalAttention)]
