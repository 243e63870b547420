"""Agent-DeiT, Agent-PVT and Agent-Swin: published sizes and cost, their blocks written out, what they refuse."""

import re

import pytest
import torch
from torch import nn

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.agent import GridAgentAttention
from regard.mechanisms.grid.partition import BlockAttention
from regard.mechanisms.grid.shifted import ShiftedWindowAttention
from regard.mechanisms.grid.strip import StripAttention
from regard.mechanisms.linear.agent import AgentAttention
from regard.mechanisms.softmax import SoftmaxAttention
from tests.models.vision.counts import gigamacs, millions
from tests.models.vision.small import SMALL


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("agent-deit-tiny", 6.0, 1.2),
        ("agent-deit-small", 22.7, 4.4),
        ("agent-deit-base", 87.2, 17.6),
        ("agent-pvt-tiny", 11.6, 2.0),
        ("agent-pvt-small", 20.6, 4.0),
        ("agent-pvt-medium", 35.9, 7.0),
        ("agent-pvt-large", 48.7, 10.4),
        ("agent-swin-tiny", 29, 4.5),
        ("agent-swin-small", 50, 8.7),
        ("agent-swin-base", 88, 15.4),
    ],
)
def test_published_sizes(name: str, parameters: float, macs: float) -> None:
    assert millions(name) == pytest.approx(parameters, rel=0.01)
    assert gigamacs(name) == pytest.approx(macs, abs=max(0.05, 0.01 * macs))  # printed with one digit


def kinds(model: nn.Module) -> list[list[type]]:
    return [[type(block.attn) for block in stage] for stage in model.stages]


def test_which_blocks_have_agents() -> None:
    with torch.device("meta"):
        deit, pvt, swin = (regard.create(f"agent-{name}") for name in ("deit-base", "pvt-tiny", "swin-base"))
    assert kinds(deit) == [[AgentAttention] * 4 + [SoftmaxAttention] * 8]
    assert kinds(pvt) == [[GridAgentAttention] * 2] * 4
    plain = ShiftedWindowAttention
    assert kinds(swin) == [[GridAgentAttention] * 2] * 2 + [[GridAgentAttention] * 2 + [plain] * 16, [plain] * 2]
    assert [block.attn.shift for block in swin.stages[2]] == [0, 0] + [0, 3] * 8
    assert [block.attn.shift for block in swin.stages[3]] == [0, 0]
    assert [swin.stages[i][0].attn.window_size for i in range(3)] == [(56, 56), (28, 28), (14, 14)]


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    config, size = SMALL[f"agent-attention/{name}"]
    return regard.create(f"agent-attention/{name}", **config, num_classes=3).eval(), torch.randn(2, 2, size, size)


def test_deit_written_out() -> None:
    model, images = small("deit")
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).movedim(1, 3).flatten(3).flatten(1, 2)  # (B, 16, 2 · 8 · 8)
    x = patches @ model.stem.weight.flatten(1).T + model.stem.bias
    x = torch.cat([model.cls_token.expand(2, 1, -1), x], 1) + model.pos_embed
    for block in model.stages[0]:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model(images), model.head(model.norm(x)[:, 0]))
    torch.testing.assert_close(model.forward_features(images)[0], x[:, 1:].view(2, 4, 4, 12))


def test_pvt_written_out() -> None:
    model, images = small("pvt")
    x, side = images.movedim(1, -1), 8
    for stage, (conv, norm), position in zip(model.stages, model.embeds, model.positions, strict=True):
        size = conv.kernel_size[0]
        patches = x.view(2, side, size, side, size, -1).permute(0, 1, 3, 5, 2, 4).flatten(3)
        x = norm(patches @ conv.weight.flatten(1).T + conv.bias).flatten(1, 2) + position
        (block,) = stage
        x = x.unflatten(1, (side, side))
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
        side //= 2
    torch.testing.assert_close(model(images), model.head(x.mean((1, 2))))


def test_swin_written_out() -> None:
    model, images = small("swin")
    x = model.stem(images.movedim(1, -1))
    for i, stage in enumerate(model.stages):
        if i:
            merging = model.downsamples[0]
            x = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = merging.reduction(merging.norm(x))
        for block in stage:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model(images), model.head(model.norm(x).mean((1, 2))))


def test_attention_without_agents_is_swins_or_pvts() -> None:
    (_, swin), pvt = small("swin")[0].stages[0], small("pvt")[0].stages[1][0]
    assert isinstance(swin.attn, BlockAttention)
    assert swin.attn.shift == 3
    attn = pvt.attn
    assert isinstance(attn, StripAttention)
    x = torch.randn(1, 4, 4, 16)
    z = attn.reduce[2](
        nn.functional.conv2d(x.movedim(-1, 1), attn.reduce[0].weight, attn.reduce[0].bias, 2).flatten(2).mT
    )
    out = []
    for h in (slice(0, 8), slice(8, 16)):
        q, k, v = attn.q_proj(x).flatten(1, 2)[..., h], attn.k_proj(z)[..., h], attn.v_proj(z)[..., h]
        out.append((q @ k.mT / 8**0.5).softmax(-1) @ v)
    torch.testing.assert_close(attn(x).flatten(1, 2), attn.o_proj(torch.cat(out, -1)))


@pytest.mark.parametrize("name", ["deit", "pvt", "swin"])
def test_images_of_another_size_are_refused(name: str) -> None:
    model, images = small(name)
    with pytest.raises(ShapeError, match="images: expected"):
        model(images[..., 8:])


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="img_size: expected a multiple of patch_size 16, got 100"):
        regard.create("agent-attention/deit", img_size=100)
    with pytest.raises(ArgumentError, match="agent_blocks: expected 0 to 12, got 13"):
        regard.create("agent-attention/deit", agent_blocks=13)
    with pytest.raises(ArgumentError, match="num_agents: expected one for each of 4 blocks, got 2"):
        regard.create("agent-attention/deit", agent_blocks=4, num_agents=(4, 9))
    with pytest.raises(Unsupported, match="qkv_bias"):
        regard.create("agent-attention/deit", agent_blocks=4, qkv_bias=False)
    with pytest.raises(ArgumentError, match="img_size: expected at least 32"):
        regard.create("agent-attention/pvt", img_size=16)
    with pytest.raises(ArgumentError, match="num_agents: expected one for each of 4 stages, got 2"):
        regard.create("agent-attention/pvt", num_agents=(9, 16))
    with pytest.raises(ArgumentError, match="img_size: expected a multiple of 32, got 240"):
        regard.create("agent-attention/swin", img_size=240)
    with pytest.raises(ArgumentError, match="window_size: windows of 56 do not divide the 64 tokens of stage 0"):
        regard.create("agent-attention/swin", img_size=256)


def published(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the authors' code for one of ours."""
    found: dict[str, torch.Tensor] = {}
    fused: dict[str, list[torch.Tensor]] = {}
    for own, tensor in state.items():
        stage = str(int(own.split(".")[1]) + 1) if own.startswith(("embeds", "positions", "stages")) else ""
        for pattern, theirs in (
            (r"^embeds\.\d\.0", f"patch_embed{stage}.proj"),
            (r"^embeds\.\d\.1", f"patch_embed{stage}.norm"),
            (r"^positions\.\d", f"pos_embed{stage}"),
            (r"^stem\.0", "patch_embed.proj"),
            (r"^stem\.1", "patch_embed.norm"),
            (r"^stem", "patch_embed.proj"),
            (r"^downsamples\.(\d)", r"layers.\1.downsample"),
            (r"^stages\.(\d)", {"deit": "blocks", "pvt": f"block{stage}", "swin": r"layers.\1.blocks"}[name]),
            (r"attn\.agent", "attn"),
            (r"biases\.", ""),
            (r"rel_pos\.table", "relative_position_bias_table"),
            (r"reduce\.0", "sr"),
            (r"reduce\.2", "norm"),
            (r"attn\.reduce", "attn.sr"),
            (r"o_proj", "proj"),
            (r"\.q_proj", ".q" if name == "pvt" else ".qkv"),
            (r"\.[kv]_proj", ".kv" if name == "pvt" else ".qkv"),
        ):
            own = re.sub(pattern, theirs, own)
        fused.setdefault(own, []).append(tensor)
    for own, tensors in fused.items():
        found[own] = torch.cat(tensors)
    return found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "deit",
            {
                "img_size": 32,
                "patch_size": 8,
                "embed_dim": 12,
                "depth": 2,
                "num_heads": 2,
                "agent_num": "4444",
                "agent_layer": 2,
            },
        ),
        (
            "pvt",
            {
                "img_size": 32,
                "patch_size": 4,
                "embed_dims": [8, 16],
                "num_heads": [1, 2],
                "mlp_ratios": [2, 2],
                "depths": [1, 1],
                "sr_ratios": [4, 2],
                "agent_sr_ratios": "21",
                "qkv_bias": True,
                "num_stages": 2,
                "agent_num": "44",
                "attn_type": "AB",
                "norm_eps": 1e-6,
            },
        ),
        (
            "swin",
            {
                "img_size": 56,
                "embed_dim": 8,
                "depths": [2, 2],
                "num_heads": [1, 2],
                "window_size": 14,
                "agent_num": ["4", "4"],
                "attn_type": "MB1",
            },
        ),
    ],
)
def test_published_names_are_loaded(name: str, arguments: dict) -> None:
    config, size = SMALL[f"agent-attention/{name}"]
    config = config | {"agent_blocks": 2} if name == "deit" else config
    torch.manual_seed(0)
    model = regard.create(f"agent-attention/{name}", **config, num_classes=3).eval()
    state = published(name, model.state_dict())
    if name == "swin":  # what the authors store and we compute
        state |= {f"layers.0.blocks.1.{n}": torch.zeros(1) for n in ("attn_mask", "attn.relative_position_index")}
    given = {"in_chans": 2, "num_classes": 3, **arguments}
    loaded = regard.from_official("agent-attention", state, variant=name, **given).eval()
    images = torch.randn(1, 2, size, size)
    torch.testing.assert_close(loaded(images), model(images), atol=0, rtol=0)
    with pytest.raises(ArgumentError, match=r"missing head\.bias"):
        regard.from_official(
            "agent-attention", {n: t for n, t in state.items() if n != "head.bias"}, variant=name, **given
        )


def test_published_arguments_that_are_refused() -> None:
    with pytest.raises(Unsupported, match="distilled"):
        regard.from_official("agent-attention", {}, variant="deit", distilled=True)
    with pytest.raises(ArgumentError, match="attn_type: expected A or B"):
        regard.from_official("agent-attention", {}, variant="pvt", attn_type="AACA")
    with pytest.raises(ArgumentError, match="attn_type: expected A, B or M"):
        regard.from_official("agent-attention", {}, variant="swin", attn_type="AAMB")
    with pytest.raises(Unsupported, match="ape"):
        regard.from_official("agent-attention", {}, variant="swin", ape=True)
