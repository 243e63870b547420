"""FaViT: published sizes, its block, images that are too small."""

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError
from regard.models.vision.favit import FaViTBlock
from tests.models.vision.counts import gigamacs, millions

TINY = {
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "depths": (1, 1),
    "sr_ratios": (2, 1),
    "window_size": 2,
}


@pytest.mark.parametrize(  # parameters of the published code, multiply-adds as its authors give them, to one decimal
    ("name", "parameters", "macs"),
    [
        ("favit-b0", 3.427704, 0.6),
        ("favit-b1", 12.958568, 2.4),
        ("favit-b2", 24.919896, 4.5),
        ("favit-b3", 48.746440, 8.5),
    ],
)
def test_published_sizes(name: str, parameters: float, macs: float) -> None:
    assert millions(name) == pytest.approx(parameters, rel=1e-7)
    assert abs(gigamacs(name) - macs) < 0.05 + 0.01 * macs


def test_a_block_is_its_equation() -> None:
    torch.manual_seed(0)
    block = FaViTBlock(16, 1, 2, 2, mlp_ratio=2.0).eval()
    x = torch.randn(1, 5, 6, 16)
    y = x + block.attn(block.norm1(x))
    mlp = block.mlp
    h = mlp.fc1(block.norm2(y)).movedim(-1, 1)
    h = F.conv2d(h, mlp.dwconv.weight, mlp.dwconv.bias, padding=1, groups=32).movedim(1, -1)
    torch.testing.assert_close(block(x), y + mlp.fc2(F.gelu(h)))


def test_stages_end_with_a_norm_and_images_may_have_any_size() -> None:
    torch.manual_seed(0)
    model = regard.create("favit", num_classes=3, **TINY).eval()
    images = torch.randn(2, 3, 33, 50)
    features = model.forward_features(images)
    assert [tuple(f.shape) for f in features] == [(2, 9, 13, 16), (2, 5, 7, 32)]
    for feature in features:
        torch.testing.assert_close(feature.mean(-1), torch.zeros_like(feature[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(images), model.head(features[-1].flatten(1, 2).mean(1)))


def test_both_poolings_have_the_same_weights() -> None:
    torch.manual_seed(0)
    model = regard.create("favit", num_classes=3, **TINY).eval()
    other = regard.create("favit", num_classes=3, window_pool="windows", **TINY).eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(images), other(images))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="images: 96 x 64 is too small at stride 4"):
        regard.create("favit-b0")(torch.randn(1, 3, 96, 64))
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("favit", **{**TINY, "depths": (1,)})
