"""GC ViT: published sizes, how it alternates, images it refuses."""

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError
from tests.models.vision.counts import gigamacs, millions

TINY = {"dim": 8, "depths": (3, 1), "num_heads": (1, 2), "window_size": (2, 4), "resolution": 32}


@pytest.mark.parametrize(  # parameters as counted by the published code, multiply-adds as in the paper, to one decimal
    ("name", "parameters", "macs"),
    [
        ("gc-vit-xxtiny", 11.995428, 2.1),
        ("gc-vit-xtiny", 19.981294, None),  # the paper's 2.6 is of another depth than the one published
        ("gc-vit-tiny", 28.221974, 4.7),
        ("gc-vit-small", 51.092173, 8.5),
        ("gc-vit-base", 90.320836, 14.8),
    ],
)
def test_published_sizes(name: str, parameters: float, macs: float | None) -> None:
    assert millions(name) == pytest.approx(parameters, rel=1e-7)
    if macs is not None:
        assert abs(gigamacs(name) - macs) < 0.05 + 0.01 * macs


def test_blocks_take_turns_on_the_queries_of_their_stage() -> None:
    torch.manual_seed(0)
    model = regard.create("gc-vit", num_classes=3, layer_scale=0.5, **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.stem(images.movedim(1, -1))
    stage = model.stages[0]
    queries = stage.queries(x)
    for block, kind in zip(stage.blocks, ("Local", "Global", "Local"), strict=True):
        assert type(block.attn).__name__ == f"{kind}WindowAttention"
        given = (queries,) if kind == "Global" else ()
        x = x + 0.5 * block.attn(block.norm1(x), *given)
        x = x + 0.5 * block.mlp(block.norm2(x))
    torch.testing.assert_close(model.forward_features(images)[0], x)


def test_poolings_follow_from_the_resolution() -> None:
    for resolution, windows in ((224, (7, 7, 14, 7)), (384, (12, 12, 24, 12)), (512, (16, 16, 32, 16))):
        with torch.device("meta"):
            model = regard.create("gc-vit", resolution=resolution, window_size=windows)
        assert [stage.queries.num_downsamples for stage in model.stages] == [3, 2, 0, 0]
    with pytest.raises(ArgumentError, match="window_size: 6 at stride 4"):
        regard.create("gc-vit", window_size=(6, 7, 14, 7))


def test_other_images_are_refused_at_once() -> None:
    model = regard.create("gc-vit", **TINY)
    with pytest.raises(ShapeError, match="images: 64 x 64 does not suit the windows"):
        model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ShapeError, match="images: 28 x 32 is 7 x 8 at stride 4, no multiple of 2"):
        model(torch.randn(1, 3, 28, 32))
    with pytest.raises(ArgumentError, match="num_heads"):
        regard.create("gc-vit", **{**TINY, "num_heads": (1,)})
