"""DaViT: published sizes, its block, images of any size, how far one pair of blocks sees."""

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, Unsupported
from regard.models.vision.davit import DaViTBlock, Downsample, Stem
from tests.models.vision.counts import gigamacs, millions


@pytest.mark.parametrize(  # as noted by the authors beside their configurations
    ("name", "parameters", "macs"),
    [
        ("davit-tiny", 28.360168, 4.540244736),
        ("davit-small", 49.745896, 8.800488192),
        ("davit-base", 87.954408, 15.51043072),
        ("davit-large", 196.811752, None),
    ],
)
def test_published_sizes(name: str, parameters: float, macs: float | None) -> None:
    assert millions(name) == pytest.approx(parameters, rel=1e-7)
    if macs is not None:
        assert gigamacs(name) == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_a_block_is_its_equation(kind: str) -> None:
    torch.manual_seed(0)
    block = DaViTBlock(8, kind, 2, window_size=2).eval()
    x = torch.randn(1, 3, 5, 8)

    def position(x, conv):
        return x + F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=8).movedim(1, -1)

    y = position(x, block.cpe[0])
    normed = block.norm1(y)
    y = y + (block.attn(normed) if kind == "spatial" else block.attn(normed.view(1, 15, 8)).view(1, 3, 5, 8))
    y = position(y, block.cpe[1])
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_two_kinds_see_everything_and_one_does_not() -> None:
    """Far corners: (spatial, channel) compares them, (spatial, spatial) of the same depth cannot."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, 8, requires_grad=True)
    for second, seen in (("channel", True), ("spatial", False)):
        y = x
        for kind in ("spatial", second):
            y = DaViTBlock(8, kind, 2, window_size=4)(y)
        gradient = torch.autograd.grad(y[0, 0, 0].sum(), x)[0]
        assert bool(gradient[0, -1, -1].abs().max() > 0) == seen


@pytest.mark.parametrize("overlapped", [False, True])
def test_odd_images_are_filled_up(overlapped: bool) -> None:
    torch.manual_seed(0)
    model = regard.create(
        "davit",
        num_classes=3,
        in_chans=1,
        embed_dims=(8, 8),
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=3,
        overlapped_patch=overlapped,
    ).eval()
    images = torch.randn(2, 1, 37, 30)
    assert model(images).shape == (2, 3)
    assert [tuple(f.shape) for f in model.forward_features(images)] == [(2, 10, 8, 8), (2, 5, 4, 8)]
    filled = F.pad(images.movedim(1, -1), (0, 0, 0, 2, 0, 3))
    torch.testing.assert_close(model.stem(filled[:, :37, :30]), model.stem.norm(model.stem.proj(filled)))


def test_zeros_come_after_the_norm() -> None:
    torch.manual_seed(0)
    down = Downsample(4, 4, overlapped=False)
    torch.nn.init.normal_(down.norm.bias)
    x = torch.randn(1, 1, 1, 4)
    want = F.linear(down.norm(x[0, 0, 0]), down.proj.weight[:, :, 0, 0], down.proj.bias)
    torch.testing.assert_close(down(x)[0, 0, 0], want)
    assert Stem(3, 8)(torch.randn(1, 5, 5, 3)).shape == (1, 2, 2, 8)


def test_options() -> None:
    block = DaViTBlock(8, "channel", 2, mlp_ratio=0.0, qkv_bias=False)
    assert not block.has_mlp
    assert block.attn.qkv.bias is None
    with pytest.raises(ArgumentError, match="kind"):
        DaViTBlock(8, "both", 2)
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("davit", depths=(1,))
    with pytest.raises(Unsupported, match="patch_size"):
        regard.from_official("davit", {}, patch_size=2)
