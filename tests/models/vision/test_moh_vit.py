"""MoH-ViT: published sizes and activated heads, what differs from TransNeXt, the balance loss, names, refusals."""

import re

import pytest
import torch

import regard
from regard.errors import ArgumentError
from regard.mechanisms.heads.moh import RoutesHeads, moh_balance_loss
from tests.models.vision.counts import millions
from tests.models.vision.small import SMALL

CONFIG, SIZE = SMALL["moh/vit"]


@pytest.mark.parametrize(
    ("name", "parameters", "activated"),
    [("s-80", 50, 0.80), ("s-75", 50, 0.75), ("b-75", 90, 0.75), ("b-50", 90, 0.50)],
)
def test_published_sizes_and_activated_heads(name: str, parameters: float, activated: float) -> None:
    assert millions(f"moh-vit-{name}") == pytest.approx(parameters, rel=0.01)
    with torch.device("meta"):
        model = regard.create(f"moh-vit-{name}")
        plain = regard.create("transnext-small" if name.startswith("s") else "transnext-base")
    layers = [layer for layer in model.modules() if isinstance(layer, RoutesHeads)]
    assert len(layers) == sum(len(stage) for stage in model.stages)
    active = sum(layer.shared_heads + layer.routed_heads for layer in layers) / sum(layer.num_heads for layer in layers)
    assert active == pytest.approx(activated, abs=0.005)
    router = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert {n.split(".")[-2] for n in router} == {"wg", "wg_0", "wg_1"}
    added = 0
    for dim, stage in zip(model.channels, model.stages, strict=True):
        attn = stage[0].attn
        routes = attn.num_heads - attn.shared_heads + 2 if attn.routed_heads else 0
        added += dim * (attn.shared_heads + routes) * len(stage)  # C (h_s + h_r + 2), where there are routed heads
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + added


def test_gates_of_one_make_it_transnext() -> None:
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIG.items() if not k.endswith("_heads") or k == "num_heads"}
    model = regard.create("moh/vit", **config, num_classes=3, shared_heads=(2, 4), routed_heads=(0, 0)).eval()
    plain = regard.create("transnext", **config, num_classes=3).eval()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".wg" not in n})
    images = torch.randn(1, 2, SIZE, SIZE)
    assert not torch.allclose(model(images), plain(images), atol=1e-6)
    for layer in model.modules():
        if isinstance(layer, RoutesHeads):
            torch.nn.init.zeros_(layer.wg_1.weight)
    torch.testing.assert_close(model(images), plain(images))


def test_the_balance_loss_trains_the_router() -> None:
    torch.manual_seed(0)
    model = regard.create("moh/vit", **CONFIG, num_classes=3)
    model(torch.randn(2, 2, SIZE, SIZE))
    loss = moh_balance_loss(model)
    (last,) = [layer for layer in model.modules() if isinstance(layer, RoutesHeads) and layer.routed_heads]
    assert loss == last.last_routing.balance_loss  # the first stage shares all of its heads and has none
    loss.backward()
    assert last.wg.weight.grad.abs().max() > 0


def test_published_names_are_loaded() -> None:
    torch.manual_seed(0)
    model = regard.create("moh/vit", **CONFIG, num_classes=3).eval()
    state = {}
    for own, tensor in model.state_dict().items():
        number = str(int(own.split(".")[1]) + 1) if not own.startswith("head") else ""
        for pattern, theirs in (
            (r"^embeds\.\d\.0", f"patch_embed{number}.proj"),
            (r"^embeds\.\d\.1", f"patch_embed{number}.norm"),
            (r"^norms\.\d", f"norm{number}"),
            (r"^stages\.\d", f"block{number}"),
            (r"cpb\.0", "cpb_fc1"),
            (r"cpb\.2", "cpb_fc2"),
            (r"mlp\.dwconv", "mlp.dwconv.dwconv"),
        ):
            own = re.sub(pattern, theirs, own)
        state[own] = tensor
    given = {
        "img_size": 32,
        "patch_size": 4,
        "in_chans": 2,
        "num_classes": 3,
        "embed_dims": [8, 16],
        "num_heads": [2, 4],
        "mlp_ratios": [3, 2],
        "qkv_bias": True,
        "depths": [1, 1],
        "sr_ratios": [4, 1],
        "num_stages": 2,
        "shared_head": [2, 2],
        "routed_head": [0, 1],
        "norm_eps": 1e-6,
    }
    loaded = regard.from_official("moh", state, variant="vit", **given).eval()
    images = torch.randn(1, 2, SIZE, SIZE)
    torch.testing.assert_close(loaded(images), model(images), atol=0, rtol=0)
    with pytest.raises(ArgumentError, match=r"missing stages\.1\.0\.attn\.wg_0\.weight"):
        regard.from_official("moh", {n: t for n, t in state.items() if "wg_0" not in n}, variant="vit", **given)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="shared_heads: expected one for each of 4 stages, got 2"):
        regard.create("moh/vit", shared_heads=(1, 2))
    with pytest.raises(ArgumentError, match="routed_heads: expected 0 to 0, got 1"):
        regard.create("moh/vit", **CONFIG | {"routed_heads": (1, 1)})
