"""NAT and DiNAT: published sizes and costs, both layouts, published weights, sizes of images."""

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid import neighborhood
from regard.models.vision.dinat import DiNAT, PatchEmbed, PatchMerging
from tests.models.vision.counts import gigamacs, millions

TINY = {
    "num_classes": 3,
    "in_chans": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
    "kernel_size": 3,
    "dilations": ((1, 2), (1,)),
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dinat-mini", 19_984_174),
        ("dinat-tiny", 27_901_582),
        ("dinat-small", 50_719_681),
        ("dinat-base", 89_769_652),
    ],
)
def test_published_parameters(name: str, parameters: int) -> None:
    assert round(millions(name) * 1e6) == parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [("nat-mini", 20), ("nat-base", 90), ("dinat-large", 200), ("dinat-s-tiny", 28), ("dinat-s-large", 197)],
)
def test_rounded_parameters(name: str, published: float) -> None:
    assert millions(name) == pytest.approx(published, abs=max(0.5, 0.01 * published))  # published in whole millions


@pytest.mark.parametrize(("name", "published"), [("dinat-mini", 2.7), ("dinat-small", 7.8), ("dinat-s-tiny", 4.5)])
def test_published_multiply_adds(name: str, published: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of attention are counted as published, per visible pair; tiles compute more than that."""
    pairs = []

    def counted(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, *args: object, **kwargs: object) -> Tensor:
        pairs.append(2 * q[..., 0, 0].numel() * kernel_size**2 * q.shape[-1] * q.shape[-2])
        return v

    monkeypatch.setattr(neighborhood, "neighborhood_attention", counted)
    assert gigamacs(name) + sum(pairs) / 1e9 == pytest.approx(published, abs=max(0.05, 0.01 * published))


def test_both_layouts_take_odd_images_and_refuse_small_ones() -> None:
    torch.manual_seed(0)
    for conv_stem in (True, False):
        model = DiNAT(**TINY, conv_stem=conv_stem).eval()
        images = torch.randn(2, 2, 45, 33)
        assert model(images).shape == (2, 3)
        assert [tuple(f.shape) for f in model.forward_features(images)] == [(2, 12, 9, 8), (2, 6, 5, 16)]
        with pytest.raises(ShapeError, match=r"images.*at least 6"):
            model(torch.randn(1, 2, 45, 20))


def test_patches_are_merged_column_by_column() -> None:
    x = torch.arange(6.0).view(1, 2, 3, 1)
    merge = PatchMerging(1)
    merge.norm = torch.nn.Identity()
    merge.reduction = torch.nn.Identity()
    assert merge(x).tolist() == [[[[0, 3, 1, 4], [2, 5, 0, 0]]]]
    embed = PatchEmbed(1, 1, 2)
    assert embed(x).shape == (1, 1, 2, 1)


def test_published_weights_of_the_other_layout() -> None:
    """DiNAT_s and layer scale are in no golden file: their published names are spelt out here."""
    torch.manual_seed(0)
    ours = DiNAT(**TINY, conv_stem=False, mlp_ratio=4.0).eval()
    published = {}
    for name, t in ours.state_dict().items():
        head, _, rest = name.partition(".")
        if head == "stem":
            published[{"0": "patch_embed.proj.", "1": "patch_embed.norm."}[rest[0]] + rest[2:]] = t
        elif head == "stages":
            stage, block, tail = rest.split(".", 2)
            published[f"layers.{stage}.blocks.{block}.{tail}"] = t
        elif head == "downsamples":
            published[f"layers.{rest[0]}.downsample.{rest[2:]}"] = t
        else:
            published[name] = t
    assert {"layers.0.downsample.reduction.weight", "layers.1.blocks.0.attn.rpb"} < published.keys()
    loaded = regard.from_official("dinat", published, **TINY).eval()
    images = torch.randn(1, 2, 32, 32)
    torch.testing.assert_close(loaded(images), ours(images))
    scaled = DiNAT(**TINY, layer_scale=0.5, mlp_ratio=4.0)
    assert scaled.stages[0][0].scale1.gamma.tolist() == [0.5] * 8


def test_an_attention_layer_without_biases_of_positions() -> None:
    layer = neighborhood.NeighborhoodAttention(8, 2, 3)
    loaded = regard.from_official(
        "dinat", layer.state_dict(), variant="attention", dim=8, num_heads=2, kernel_size=3, dilation=None
    )
    x = torch.randn(1, 5, 6, 8)
    torch.testing.assert_close(loaded(x), layer(x))
    with pytest.raises(ArgumentError, match="dim"):
        regard.from_official("dinat", layer.state_dict(), variant="attention", num_heads=2, kernel_size=3)


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="num_heads"):
        DiNAT(depths=(1, 1), num_heads=(1,))
    with pytest.raises(ArgumentError, match="dilations"):
        DiNAT(**TINY | {"dilations": ((1,), (1,))})
