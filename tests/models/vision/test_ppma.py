"""PPMAViT: published sizes and cost, its blocks, images of other sizes, what it refuses."""

from functools import partial

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.polyline import PolylinePathAttention
from regard.models.vision.ppma import PPMAViT
from regard.models.vision.pyramid import PyramidBlock
from tests.models.vision.counts import gigamacs, millions

SMALL = {"num_classes": 3, "embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2)}


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [("ppma-tiny", 14_335_272, 2.7), ("ppma-small", 26_969_472, 4.9), ("ppma-base", 54_158_524, 10.6)],
)
def test_published_sizes(name: str, parameters: int, macs: float) -> None:
    """The published count is of code that keeps the weights; here each score is made twice, and a whole sum too."""
    assert round(millions(name) * 1e6) == parameters
    with torch.device("meta"):
        model = regard.create(name)
    twice = 0
    for i, stage in enumerate(model.stages):
        side, dim = 56 // 2**i, model.channels[i]
        for block in stage:
            seen = side**2 if block.attn.form == "whole" else side
            twice += 2 * side**2 * seen * dim
    assert gigamacs(name) - twice / 1e9 == pytest.approx(macs, abs=0.01 * macs)


def test_a_block_is_its_equation() -> None:
    torch.manual_seed(0)
    block = PyramidBlock(8, partial(PolylinePathAttention, 8, 2, "chunk"), 1.5, 0.0, 0.5).double()
    x = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    y = x + block.pos(x)
    y = y + 0.5 * block.attn(torch.nn.functional.layer_norm(y, (8,), eps=1e-6))
    h = torch.nn.functional.gelu(block.ffn.fc1(torch.nn.functional.layer_norm(y, (8,), eps=1e-6)))
    filled = torch.zeros(2, 7, 6, 12, dtype=torch.float64)
    filled[:, 1:-1, 1:-1] = h
    taps = block.ffn.dwconv.weight[:, 0].permute(1, 2, 0)
    near = sum(taps[a, b] * filled[:, a : a + 5, b : b + 4] for a in range(3) for b in range(3))
    y = y + 0.5 * block.ffn.fc2(h + near + block.ffn.dwconv.bias)
    torch.testing.assert_close(block(x), y)


def test_images_of_any_size() -> None:
    torch.manual_seed(0)
    model = PPMAViT(**SMALL, forms=("chunk", "whole"), features_only=True).eval()
    large, small = model(torch.randn(1, 3, 33, 50))
    assert large.shape == (1, 8, 9, 13)
    assert small.shape == (1, 16, 5, 7)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="forms"):
        PPMAViT(**SMALL)
    with pytest.raises(ArgumentError, match="form: expected one of"):
        PPMAViT(**SMALL, forms=("chunk", "lines"))
    with pytest.raises(ArgumentError, match="layer_scale"):
        PPMAViT(**SMALL, forms=("chunk", "whole"), layer_scale=(None,))
    with pytest.raises(ShapeError, match="images"):
        PPMAViT(**SMALL, forms=("chunk", "whole"))(torch.randn(1, 1, 32, 32))
    with pytest.raises(ArgumentError, match=r"missing stem\.0\.weight"):
        PPMAViT.from_official({}, embed_dims=(8,), depths=(1,), num_heads=(1,))
