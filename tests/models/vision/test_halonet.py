"""HaloNet: sizes of timm's models, its names for weights, and what is refused."""

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.halo import HaloAttention
from regard.models.vision.halonet import HaloNet
from tests.models.vision.counts import millions

BLOCK = {"type": "self_attn", "d": 1, "c": 16, "s": 1, "gs": 0, "br": 0.5}
CFG = {
    "blocks": [
        BLOCK,
        [{"type": "bottle", "d": 1, "c": 24, "br": 0.5}, {"type": "self_attn", "d": 1, "c": 24, "br": 0.5}],
    ],
    "stem_chs": 16,
    "stem_type": "tiered",
    "stem_pool": "",
    "act_layer": "silu",
    "num_features": 40,
    "self_attn_layer": "halo",
    "self_attn_kwargs": {"block_size": 2, "halo_size": 1, "num_heads": 2},
}


@pytest.mark.parametrize(
    ("name", "parameters"), [("halonet-h1", 8_100_056), ("halonet-26t", 12_480_288), ("halonet-50ts", 22_733_280)]
)
def test_published_parameters(name: str, parameters: int) -> None:
    assert round(millions(name) * 1e6) == parameters


def test_other_configurations_of_the_published_code() -> None:
    """A tiered stem without pooling, convolutions between, a last projection: published names, spelt out."""
    torch.manual_seed(0)
    ours = HaloNet(
        3,
        2,
        dims=(16, 24),
        depths=(1, 2),
        strides=(1, 2),
        halo=((True,), (False, True)),
        num_heads=2,
        block_size=2,
        halo_size=1,
        bottleneck_ratio=0.5,
        stem_dim=16,
        stem="tiered",
        stem_pool=False,
        act="silu",
        projection=40,
    ).eval()
    published = {}
    for name, t in ours.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            name = ".".join(["stem", f"conv{int(parts[1]) // 2 + 1}", *parts[2:]])
        elif parts[0] == "stages":
            attends = isinstance(ours.stages[int(parts[1])][int(parts[2])].mix, HaloAttention)
            new = {"conv1": "conv1_1x1", "conv2": "conv3_1x1", "norm": "post_attn", "shortcut": "shortcut"}
            new["mix"] = "self_attn" if attends else "conv2_kxk"
            tail = ["pos_embed", *parts[4:]] if parts[4].endswith("_rel") else parts[4:]
            name = ".".join([*parts[:3], new[parts[3]], *tail])
        elif parts[0] == "proj":
            name = ".".join(["final_conv", *parts[2:]])
        elif parts[0] == "head":
            name = ".".join(["head", "fc", *parts[1:]])
        published[name] = t
    assert {"stem.conv3.conv.weight", "stages.1.1.self_attn.pos_embed.width_rel"} < published.keys()
    loaded = regard.from_official("halonet", published, cfg=CFG, num_classes=3, in_chans=2).eval()
    images = torch.randn(1, 2, 32, 32)
    torch.testing.assert_close(loaded(images), ours(images))
    assert [f.shape[1] for f in ours.forward_features(images)] == [8, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_attn_layer": "lambda"}, "self_attn_layer"),
        ({"stem_type": "quad"}, "stem_type"),
        ({"blocks": [BLOCK | {"gs": 16}]}, "plain blocks"),
        ({"blocks": [[BLOCK, BLOCK | {"c": 24}]]}, "differs"),
        ({"blocks": [BLOCK, BLOCK | {"self_attn_kwargs": {"dim_head": 4}}]}, "between stages"),
    ],
)
def test_other_networks_of_the_published_code_are_refused(change: dict, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        regard.from_official("halonet", {}, cfg=CFG | change)


@pytest.mark.parametrize(
    ("stem", "pool", "stride", "widths"),
    [
        ("7x7", True, 4, [16]),
        ("3x3", False, 2, [16]),
        ("deep", False, 4, [16, 16, 16]),
        ("tiered", True, 4, [6, 8, 16]),
    ],
)
def test_stems(stem: str, pool: bool, stride: int, widths: list[int]) -> None:
    model = HaloNet(dims=(16,), depths=(1,), strides=(1,), num_heads=2, stem_dim=16, stem=stem, stem_pool=pool)
    assert model.strides == (stride,)
    assert model.stem(torch.zeros(1, 32, 32, 3)).shape == (1, 32 // stride, 32 // stride, 16)
    assert [p.shape[0] for n, p in model.stem.named_parameters() if n.endswith("conv.weight")] == widths


def test_arguments_and_sizes() -> None:
    for kwargs, message in (
        ({"depths": (1,)}, "depths"),
        ({"halo": ((True,),)}, "halo"),
        ({"act": "tanh"}, "act"),
        ({"stem": "patch"}, "stem"),
        ({"num_heads": (8, 8)}, "num_heads"),
    ):
        with pytest.raises(ArgumentError, match=message):
            HaloNet(**kwargs)
    model = HaloNet(dims=(16,), depths=(1,), strides=(1,), num_heads=2)
    with pytest.raises(ShapeError, match="block_size 8"):
        model(torch.zeros(1, 3, 36, 36))
