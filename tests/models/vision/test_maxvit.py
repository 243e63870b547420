"""MaxViT: published sizes, its blocks piece by piece, what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers.relative_position import load_resized
from regard.models.vision.maxvit import MaxViTBlock, MBConv, PartitionLayer, SameConv2d
from tests.models.vision.counts import gigamacs, millions


@pytest.mark.parametrize(  # parameters as counted by timm's models, multiply-adds as in the paper
    ("name", "parameters", "macs"),
    [("maxvit-tiny", 30.916528, 5.6), ("maxvit-small", 68.927956, 11.7), ("maxvit-base", 119.467708, 24.0)],
)
def test_published_sizes(name: str, parameters: float, macs: float) -> None:
    assert millions(name) == pytest.approx(parameters, rel=1e-7)
    # the paper counts what is no product of matrices (norms, pooling, gates) too, about one in a hundred
    assert macs * 0.988 < gigamacs(name) < macs


def test_a_convolution_block_is_its_equation() -> None:
    torch.manual_seed(0)
    block = MBConv(4, 6, 2, expand_ratio=4.0, se_ratio=0.5).double().eval()
    for norm in (block.norm0, block.norm1, block.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)

    def batch_norm(t, norm):
        return (t - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias

    def gelu(t):
        return 0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3)))

    h = gelu(batch_norm(batch_norm(x, block.norm0) @ block.fc1.weight.T, block.norm1))
    filled = torch.zeros(2, 7, 5, 24, dtype=torch.float64)
    filled[:, :6, :4] = h
    conv = torch.zeros(2, 3, 2, 24, dtype=torch.float64)
    for y in range(3):
        for z in range(2):
            patch = filled[:, 2 * y : 2 * y + 3, 2 * z : 2 * z + 3]
            conv[:, y, z] = (patch * block.dwconv.weight[:, 0].permute(1, 2, 0)).sum((1, 2))
    h = gelu(batch_norm(conv, block.norm2))
    hidden = F.silu(h.mean((1, 2)) @ block.se.fc1.weight.T + block.se.fc1.bias)
    h = h * (hidden @ block.se.fc2.weight.T + block.se.fc2.bias).sigmoid()[:, None, None]
    h = h @ block.fc2.weight.T + block.fc2.bias
    pooled = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    torch.testing.assert_close(block(x), pooled @ block.shortcut.weight.T + block.shortcut.bias + h)
    assert isinstance(MBConv(4, 4, 2).shortcut, nn.Identity)


@pytest.mark.parametrize(("side", "kernel_size", "stride"), [(6, 3, 2), (7, 3, 2), (5, 5, 3), (4, 3, 1)])
def test_convolutions_pad_as_tensorflow_does(side: int, kernel_size: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = SameConv2d(1, 1, kernel_size, stride)
    x = torch.randn(1, side, side, 1)
    out = -(-side // stride)
    before = max(0, (out - 1) * stride + kernel_size - side) // 2
    got = conv(x)
    assert got.shape == (1, out, out, 1)
    corner = F.pad(x[0, :, :, 0], (before, kernel_size, before, kernel_size))[:kernel_size, :kernel_size]
    torch.testing.assert_close(got[0, 0, 0], (corner * conv.weight[0, 0]).sum()[None] + conv.bias)


def test_a_block_mixes_near_then_far() -> None:
    torch.manual_seed(0)
    block = MaxViTBlock(8, 8, 1, 2, 2, attention={"head_dim": 4}).eval()
    conv, near, far = block
    x = torch.randn(1, 4, 4, 8)
    y = conv(x)
    for layer, kind in ((near, "BlockAttention"), (far, "GridAttention")):
        assert type(layer.attn).__name__ == kind
        y = y + layer.attn(layer.norm1(y))
        y = y + layer.mlp(layer.norm2(y))
    torch.testing.assert_close(block(x), y)


def test_windows_and_grids_of_different_shape_and_no_hidden_layer() -> None:
    model = regard.create(
        "maxvit",
        num_classes=3,
        embed_dims=(8, 16),
        depths=(1, 1),
        stem_width=8,
        partition_size=(2, 1),
        grid_size=(1, 3),
        head_hidden=None,
        attention={"head_dim": 4, "layer_scale": 0.1, "relative_bias": False},
        conv={"act": "gelu", "same": False},
    ).eval()
    assert model(torch.randn(1, 3, 16, 24)).shape == (1, 3)
    assert model.num_features == 16
    with pytest.raises(ShapeError, match="grid_size"):
        model(torch.randn(1, 3, 16, 16))


def test_weights_move_on_to_larger_images() -> None:
    torch.manual_seed(0)
    config = {"embed_dims": (8,), "depths": (1,), "stem_width": 8, "num_classes": 3, "attention": {"head_dim": 4}}
    small, large = (regard.create("maxvit", partition_size=p, **config).eval() for p in (2, 4))
    load_resized(large, small)
    assert large(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    torch.testing.assert_close(large.stages[0][0][0].fc1.weight, small.stages[0][0][0].fc1.weight)
    assert large.stages[0][0][1].attn.rel_pos().shape == (2, 16, 16)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"window_size: \(7, 7\) does not divide the grid \(50, 50\)"):
        regard.create("maxvit", embed_dims=(32,), depths=(1,))(torch.randn(1, 3, 200, 200))
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("maxvit", depths=(1, 1))
    with pytest.raises(ArgumentError, match="kind"):
        PartitionLayer(32, "window")
    with pytest.raises(ArgumentError, match="head_dim"):
        PartitionLayer(30, "block")
    with pytest.raises(Unsupported, match="block_type"):
        regard.from_official("maxvit", {}, cfg={"block_type": ["C"]})
    with pytest.raises(Unsupported, match="rel_pos_type"):
        regard.from_official("maxvit", {}, variant="layer", dim=8, cfg={"rel_pos_type": "mlp", "window_size": (2, 2)})
    with pytest.raises(Unsupported, match="attn_early"):
        regard.from_official(
            "maxvit", {}, cfg={"block_type": ["M"] * 4, "conv_cfg": {"attn_early": True}, "transformer_cfg": {}}
        )
