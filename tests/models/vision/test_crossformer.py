"""CrossFormer: published sizes, embeddings of several scales, how blocks alternate, what it refuses."""

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.models.vision.crossformer import CrossFormerBlock, CrossScaleEmbedding
from tests.models.vision.counts import gigamacs, millions

TINY = {
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (2, 2),
    "group_size": (3, 2),
    "interval": (2, 1),
    "patch_size": (4, 8),
    "merge_size": ((2, 4),),
}


@pytest.mark.parametrize(  # parameters of the published code, multiply-adds of the papers, both to the digits given
    ("name", "parameters", "macs"),
    [
        ("crossformer-tiny", 27.776794, 2.9),
        ("crossformer-small", 30.657394, 4.9),
        ("crossformer-base", 51.971554, 9.2),
        ("crossformer-large", 91.971184, 16.1),
        ("crossformer-pp-small", 23.3, None),  # said to be 4.9, as much as CrossFormer-S; its configuration has 4.4
        ("crossformer-pp-base", 52.0, 9.5),
        ("crossformer-pp-large", 92.0, 16.6),
        ("crossformer-pp-huge", 96.0, 21.8),
    ],
)
def test_published_sizes(name: str, parameters: float, macs: float | None) -> None:
    assert millions(name) == pytest.approx(parameters, abs=0.05 if "pp" in name else 1e-6)
    if macs is not None:
        assert abs(gigamacs(name) - macs) < 0.05 + 0.01 * macs


def test_patches_of_all_sizes_share_their_centres() -> None:
    torch.manual_seed(0)
    embedding = CrossScaleEmbedding(1, 16, (4, 8, 16, 32), 4)
    assert [proj.weight.shape[0] for proj in embedding.projs] == [8, 4, 2, 2]
    assert [p.weight.shape[0] for p in CrossScaleEmbedding(1, 8, (2,), 2).projs] == [8]
    x = torch.randn(1, 32, 32, 1)
    y = embedding(x)
    assert y.shape == (1, 8, 8, 16)
    for proj, part in zip(embedding.projs, y.split([8, 4, 2, 2], -1), strict=True):
        size = proj.weight.shape[-1]
        filled = F.pad(x[0, :, :, 0], (14,) * 4)  # patch (3, 5) is centred at pixel (14, 22) whatever its size
        top, left = 14 + 14 - size // 2, 14 + 22 - size // 2
        patch = filled[top : top + size, left : left + size]
        torch.testing.assert_close(part[0, 3, 5], (proj.weight[:, 0] * patch).sum((1, 2)) + proj.bias)


def test_a_block_is_its_equation() -> None:
    torch.manual_seed(0)
    block = CrossFormerBlock(16, 2, 2, 2, "long", cooling=True).eval()
    x = torch.randn(1, 5, 6, 16)
    y = x + block.attn(block.norm1(x))
    y = y + block.mlp(block.norm2(y))
    conv, norm = block.cooling
    y = F.conv2d(y.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=16).movedim(1, -1)
    torch.testing.assert_close(block(x), norm(y))


def test_near_and_far_take_turns_and_every_third_block_cools() -> None:
    model = regard.create("crossformer", cooling=True, **{**TINY, "depths": (3, 7)})
    for stage, cooled in zip(model.stages, ([], [2, 5]), strict=True):
        assert [block.attn.mode for block in stage] == (["short", "long"] * 4)[: len(stage)]
        assert [j for j, block in enumerate(stage) if isinstance(block.cooling, torch.nn.Sequential)] == cooled


def test_other_sizes_of_images_and_of_groups() -> None:
    """The position network knows any offset: a model runs at other sizes, and with other groups per block."""
    torch.manual_seed(0)
    model = regard.create("crossformer", num_classes=3, **TINY).eval()
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3)
    other = regard.create("crossformer", num_classes=3, **{**TINY, "group_size": (4, (2, 3, 2, 1))}).eval()
    other.load_state_dict(model.state_dict())
    assert other(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    bias = model.stages[0][0].attn.pos
    torch.testing.assert_close(bias(5)[:, :3, :3], bias(3)[:, :3, :3])


def test_refusals() -> None:
    model = regard.create("crossformer", **TINY)
    with pytest.raises(ShapeError, match="multiples of 8"):
        model(torch.randn(1, 3, 36, 32))
    with pytest.raises(ArgumentError, match="merge_size: expected 1"):
        regard.create("crossformer", **{**TINY, "merge_size": ()})
    with pytest.raises(ArgumentError, match="group_size"):
        regard.create("crossformer", **{**TINY, "group_size": (3, (2, 2))})
    with pytest.raises(Unsupported, match="use_cpe"):
        regard.from_official("crossformer", {}, use_cpe=True)
    with pytest.raises(Unsupported, match="group_type"):
        regard.from_official("crossformer", {}, group_type="linear")
    with pytest.raises(ArgumentError, match="windowsize: not an argument"):
        regard.from_official("crossformer", {}, variant="block", dim=16, num_heads=2, windowsize=3)
    with pytest.raises(ArgumentError, match="embed_dim: expected a multiple of 8 for 4 kernels, got 20"):
        regard.create("crossformer", embed_dim=20)
