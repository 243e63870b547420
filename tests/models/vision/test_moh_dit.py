"""MoH-DiT: published sizes and activated heads, a block and the whole written out, guidance, names, refusals."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.heads.moh import moh_balance_loss
from regard.models.vision.moh_dit import MoHDiT, grid_sinusoids

TINY = {
    "img_size": 8,
    "dim": 16,
    "depth": 2,
    "num_heads": (2, 4),
    "shared_heads": (2, 2),
    "routed_heads": (0, 1),
    "head_dim": 6,
    "num_classes": 5,
}


def model(**config: object) -> MoHDiT:
    torch.manual_seed(0)
    found = regard.create("moh/dit", **TINY | config)
    for parameter in found.parameters():  # a new one predicts zeros
        nn.init.normal_(parameter, std=0.2)
    return found.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, 8, 8), torch.tensor([0.0, 17.0, 999.5]), torch.tensor([4, 0, 2])


@pytest.mark.parametrize(
    ("size", "parameters", "macs", "activated"),
    [  # parameters and multiply-adds are those of DiT, to which routers add little; its table has them at 256 pixels
        ("s-90", 33, 6.06, 0.9),
        ("s-75", 33, 6.06, 0.75),
        ("b-90", 130, 23.01, 0.9),
        ("b-75", 130, 23.01, 0.75),
        ("l-90", 458, 80.71, 0.9),
        ("l-75", 458, 80.71, 0.75),
        ("xl-90", 675, 118.64, 0.9),
        ("xl-75", 675, 118.64, 0.75),
    ],
)
def test_published_sizes_and_activated_heads(size: str, parameters: float, macs: float, activated: float) -> None:
    with torch.device("meta"):
        found = regard.create(f"moh-dit-{size}").eval()
        images, steps = torch.empty(1, 4, 32, 32), torch.zeros(1)
    assert sum(p.numel() for p in found.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found(images, steps, steps.long())
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.01)
    layers = [block.attn for block in found.blocks]
    share = sum(a.shared_heads + a.routed_heads for a in layers) / sum(a.num_heads for a in layers)
    assert share == pytest.approx(activated, abs=0.012)


def test_positions_are_sinusoids_of_column_and_row() -> None:
    table = grid_sinusoids(8, 3)[0]
    for row in range(3):
        for column in range(3):
            want = []
            for place in (column, row):
                angles = [place, place / 100]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[3 * row + column], torch.tensor(want))


def test_it_is_written_out() -> None:
    net, (x, t, y) = model(), inputs()
    want = torch.zeros(3, 8, 8, 8)
    for b in range(3):
        waves = [math.exp(-math.log(10_000) * i / 128) * t[b].item() for i in range(128)]
        told = net.time(torch.tensor([math.cos(w) for w in waves] + [math.sin(w) for w in waves]))
        c = F.silu(told + net.classes.weight[y[b]])
        patches = x[b].view(4, 4, 2, 4, 2).permute(1, 3, 0, 2, 4).reshape(16, 16)
        tokens = patches @ net.stem.weight.flatten(1).T + net.stem.bias + net.positions[0]
        for block in net.blocks:
            m = (block.modulation[1].weight @ c + block.modulation[1].bias).view(6, 16)
            normed = F.layer_norm(tokens, (16,), eps=1e-6) * (1 + m[1]) + m[0]
            tokens = tokens + m[2] * block.attn(normed[None])[0]
            hidden = F.layer_norm(tokens, (16,), eps=1e-6) * (1 + m[4]) + m[3]
            tokens = tokens + m[5] * block.mlp.fc2(F.gelu(block.mlp.fc1(hidden), approximate="tanh"))
        m = (net.modulation[1].weight @ c + net.modulation[1].bias).view(2, 16)
        pixels = net.head(F.layer_norm(tokens, (16,), eps=1e-6) * (1 + m[1]) + m[0])
        for row in range(4):
            for column in range(4):
                patch = pixels[4 * row + column].view(2, 2, 8).permute(2, 0, 1)
                want[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch
    torch.testing.assert_close(net(x, t, y), want, atol=1e-4, rtol=1e-4)


def test_a_new_one_predicts_zeros_and_trains() -> None:
    torch.manual_seed(0)
    net, (x, t, y) = regard.create("moh/dit", **TINY), inputs()
    assert net(x, t, y).eq(0).all()
    net = model().train()
    (net(x, t, y).square().mean() + 0.01 * moh_balance_loss(net)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    noise = regard.create("moh/dit", **TINY, learn_sigma=False)
    assert noise(x, t, y).shape == x.shape


def test_classes_are_withheld() -> None:
    net, (x, t, y) = model(), inputs()
    none = torch.full_like(y, 5)
    held = net(x, t, y, withheld=torch.tensor([True, False, True]))
    torch.testing.assert_close(held[::2], net(x, t, none)[::2])
    torch.testing.assert_close(held[1], net(x, t, y)[1])
    always = model(class_dropout=1.0)
    torch.testing.assert_close(always.train()(x, t, y), always.eval()(x, t, none))


def test_guidance() -> None:
    net, (x, t, y) = model(), inputs()
    told, untold = net(x, t, y), net(x, t, torch.full_like(y, 5))
    guided = net.guided(x, t, y, 1.5)
    torch.testing.assert_close(guided[:, :3], untold[:, :3] + 1.5 * (told - untold)[:, :3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided[:, 3:], told[:, 3:], atol=1e-4, rtol=1e-4)
    with pytest.raises(Unsupported, match="class_dropout"):
        model(class_dropout=0.0).guided(x, t, y, 1.5)


def test_a_folder_bfloat16_and_one_graph(tmp_path) -> None:
    net, given = model(), inputs()
    want = net(*given)
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(MoHDiT.from_pretrained(tmp_path).eval()(*given), want, atol=0, rtol=0)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), want, atol=1e-4, rtol=1e-4)
    exported = torch.export.export(net, given)
    torch.testing.assert_close(exported.module()(*given), want, atol=1e-4, rtol=1e-4)
    assert net.bfloat16()(given[0].bfloat16(), *given[1:]).dtype == torch.bfloat16


def test_published_names_are_loaded() -> None:
    net, given = model(), inputs()
    state: dict[str, torch.Tensor] = {}
    for own, tensor in net.state_dict().items():
        for pattern, theirs in (
            (r"^stem", "x_embedder.proj"),
            (r"^positions", "pos_embed"),
            (r"^time", "t_embedder.mlp"),
            (r"^classes", "y_embedder.embedding_table"),
            (r"^head", "final_layer.linear"),
            (r"^modulation", "final_layer.adaLN_modulation"),
            (r"\.modulation", ".adaLN_modulation"),
            (r"final_layer\.adaLN_adaLN", "final_layer.adaLN"),
            (r"o_proj", "proj"),
            (r"[qkv]_proj", "qkv"),
        ):
            own = re.sub(pattern, theirs, own)
        state[own] = torch.cat([state[own], tensor]) if own in state else tensor
    arguments = {
        "input_size": 8,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": [2, 4],
        "shared_head": [2, 2],
        "routed_head": [0, 1],
        "head_dim": 6,
        "num_classes": 5,
        "moh": True,
    }
    loaded = regard.from_official("moh", state, variant="dit", **arguments).eval()
    torch.testing.assert_close(loaded(*given), net(*given), atol=0, rtol=0)
    with pytest.raises(ArgumentError, match="missing positions"):
        regard.from_official("moh", {n: v for n, v in state.items() if n != "pos_embed"}, variant="dit", **arguments)
    with pytest.raises(Unsupported, match="moh: expected True"):
        regard.from_official("moh", state, variant="dit", **arguments | {"moh": False})
    with pytest.raises(Unsupported, match="head_dim: expected the same"):
        regard.from_official("moh", state, variant="dit", **arguments | {"head_dim": [6, 8]})


def test_bad_arguments() -> None:
    net, (x, t, y) = model(), inputs()
    with pytest.raises(ShapeError, match=r"x: expected \(B, 4, 8, 8\)"):
        net(x[:, :3], t, y)
    with pytest.raises(ShapeError, match=r"t: expected \(3,\), got \(2,\)"):
        net(x, t[:2], y)
    with pytest.raises(ShapeError, match=r"y: expected \(3,\), got \(3, 1\)"):
        net(x, t, y[:, None])
    for config, message in (
        ({"img_size": 9}, "img_size: expected a multiple of patch_size 2, got 9"),
        ({"class_dropout": 1.5}, "class_dropout: expected 0 to 1"),
        ({"num_heads": (2, 4, 4)}, "num_heads: expected one for each of 2 blocks, got 3"),
        ({"routed_heads": (1, 1)}, "routed_heads: expected 0 to 0, got 1"),
        ({"dim": 18}, "dim: expected a multiple of 4, got 18"),
    ):
        with pytest.raises(ArgumentError, match=message):
            regard.create("moh/dit", **TINY | config)
