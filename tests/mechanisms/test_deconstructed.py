"""Deconstructed attention against its weights written out; indicators; the model with a second stream."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.linear.deconstructed import (
    DecoupledQKAttention,
    GatedMLPMixer,
    KeyGatedAttention,
    TaylorAttention,
    key_gated_attention,
)
from regard.models.language.deconstructed import PLACEMENTS, VARIANTS, DeconstructedLM, skip_variant_layers
from regard.probes import attention_indicators

GOLDEN = load_file(Path(__file__).parents[1] / "parity" / "golden" / "deconstructing-attention.safetensors")


def test_taylor_weights_written_out() -> None:
    torch.manual_seed(0)
    layer = TaylorAttention(8, 2).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (p(x)[0].view(6, 2, 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = torch.zeros(6, 2, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(6):
            s = torch.stack([q[i, h] @ k[j, h] / 2 for j in range(i + 1)])
            w = 1 + s + s**2 / 2
            out[i, h] = (w / (w.sum() + 1e-6)) @ v[: i + 1, h]
    torch.testing.assert_close(layer(x)[0], layer.o_proj(out.flatten(1)))


def test_key_gated_weights_are_those_of_the_paper() -> None:
    q, k, v = (GOLDEN[f"in/{name}"] for name in "qkv")
    torch.testing.assert_close(key_gated_attention(q, k, v)[0], GOLDEN["oracle/non_approximate"], atol=1e-5, rtol=0)
    eye = torch.eye(9).expand(2, 2, 9, 9)
    weights, _ = key_gated_attention(q, k, eye)
    torch.testing.assert_close(weights, GOLDEN["oracle/non_approximate_attn"], atol=1e-5, rtol=0)


def test_indicators() -> None:
    got = attention_indicators(GOLDEN["in/attn_map"])
    for name in ("entropy", "concentration", "head_diversity", "sink"):
        torch.testing.assert_close(got[name], GOLDEN[f"oracle/{name}"], atol=1e-5, rtol=0)
    for d in range(4):
        torch.testing.assert_close(got["local_focus"][..., d], GOLDEN[f"oracle/locfoc{d}"], atol=1e-5, rtol=0)
    uniform = attention_indicators(torch.full((1, 1, 4, 4), 0.25))
    assert uniform["entropy"].item() == pytest.approx(4 * torch.tensor(4.0).log().item())
    assert uniform["head_diversity"].item() == 0
    with pytest.raises(ShapeError, match="weights"):
        attention_indicators(torch.randn(2, 3, 4))


@pytest.mark.parametrize("cls", [TaylorAttention, KeyGatedAttention, DecoupledQKAttention])
def test_gradients(cls) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cls(4, 2).double(), (x,))


def test_the_mlp_has_the_parameters_of_attention() -> None:
    count = sum(p.numel() for p in GatedMLPMixer(96).parameters())
    assert count == 4 * 96**2


def test_decoupled_attention_ignores_its_input_in_the_weights() -> None:
    torch.manual_seed(0)
    layer = DecoupledQKAttention(8, 2)
    source, x, y = torch.randn(1, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x + y, source=source), layer(x, source=source) + layer(y, source=source))
    pieces, state = [], None
    for t in range(5):
        out, state = layer.stream(x[:, t : t + 1], state, source=source[:, t : t + 1])
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x, source=source))
    with pytest.raises(ShapeError, match="source"):
        layer(x, source=source[:, :3])


def model(variant: str, placement: str = "uniform", depth: int = 4) -> DeconstructedLM:
    torch.manual_seed(0)
    fixed = {"fixed_ids": list(range(16))} if variant == "fixed-qk" else {}
    return DeconstructedLM(30, 16, depth, 2, variant, placement, max_length=16, **fixed).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_see_no_future(variant: str) -> None:
    lm = model(variant, "even")
    ids = torch.randint(0, 30, (2, 9))
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 30
    torch.testing.assert_close(lm(other)[:, :6], lm(ids)[:, :6])
    assert not torch.allclose(lm(other)[:, 6:], lm(ids)[:, 6:])
    lm(ids).sum().backward()


def test_variants_have_the_parameters_of_the_standard_model() -> None:
    counts = {v: sum(p.numel() for n, p in model(v).named_parameters() if "bias" not in n) for v in VARIANTS}
    rounding = abs(counts.pop("mlp") - counts["standard"])
    assert len(set(counts.values())) == 1
    assert rounding <= 4 * 3 * 16  # one hidden channel of three matrices in each layer


def test_placements() -> None:
    standard = {name: [i for i in range(1, 25) if keeps(i, 24)] for name, keeps in PLACEMENTS.items()}
    assert standard["uniform"] == []
    assert standard["even"] == list(range(2, 25, 2))
    assert standard["top"] == list(range(1, 13))
    assert standard["middle"] == list(range(7, 19))
    assert standard["bottom"] == list(range(13, 25))
    assert standard["quarter"] == [4, 8, 12, 16, 20, 24]
    assert standard["bilateral"] == [1, 24]


def test_skipping_leaves_the_standard_layers() -> None:
    hybrid = model("approximate", "even")
    small = skip_variant_layers(hybrid)
    assert len(small.model.blocks) == 2
    assert len(hybrid.model.blocks) == 4
    torch.testing.assert_close(small.model.blocks[0].norm1.weight, hybrid.model.blocks[1].norm1.weight)
    assert small(torch.randint(0, 30, (1, 5))).shape == (1, 5, 30)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="variant"):
        DeconstructedLM(30, variant="none")
    with pytest.raises(ArgumentError, match="placement"):
        DeconstructedLM(30, placement="left")
    with pytest.raises(ArgumentError, match="fixed_ids"):
        DeconstructedLM(30, variant="fixed-qk")
    with pytest.raises(ShapeError, match="ids"):
        model("standard")(torch.zeros(1, 17, dtype=torch.long))
    assert isinstance(regard.create("deconstructing-attention/model", vocab_size=9, dim=8, depth=2), DeconstructedLM)
