"""Doge beside transformers, with and without experts, and token by token."""

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.models.language.doge import Doge, RetrievalExperts

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "keep_window_size": 6,
}
OURS = {"vocab_size": 50, "dim": 16, "depth": 2, "num_heads": 4, "hidden_dim": 24, "window_size": 5}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
        {"is_moe": True, "num_experts": 18, "num_experts_per_tok": 3, "rope_parameters": {"rope_theta": 100.0}},
    ],
)
def test_it_is_the_one_in_transformers(config) -> None:
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_type"] = "default"
    torch.manual_seed(0)
    official = DogeForCausalLM(DogeConfig(**SMALL, **config, attn_implementation="eager")).eval()
    for parameter in official.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randperm(50)[:20].view(1, 20)  # none twice, so that no keys are equal
    model = Doge.from_official(official.state_dict(), **SMALL, **config).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), official(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 16, "top_k": 3}])
def test_it_streams(experts) -> None:
    torch.manual_seed(0)
    model = Doge(**OURS, **experts).double()
    for block in model.blocks:
        torch.nn.init.normal_(block.mixer.A)
    ids = torch.randint(50, (2, 17))
    state, got = None, []
    for piece in ids.split([9, 1, 7], 1):
        logits, state = model.stream(piece, state)
        got.append(logits)
    assert state.length == 17
    torch.testing.assert_close(torch.cat(got, 1), model(ids), atol=1e-12, rtol=0)


def test_experts_are_their_equation() -> None:
    torch.manual_seed(0)
    layer = RetrievalExperts(8, 12, num_experts=10, top_k=2).double()  # 3 x 3 of them can be found
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for row, got in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
        g = layer.router_gate(row)
        score = torch.stack([g[a] + g[3 + b] for a in range(3) for b in range(3)])
        best = score.topk(2)
        want = layer.shared(row)
        for weight, e in zip(best.values.softmax(0), best.indices, strict=True):
            inner = torch.nn.functional.silu(layer.down_embed.weight[e] @ row)
            want = want + weight * inner * layer.up_embed.weight[e]
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_refusals() -> None:
    model = Doge(**OURS, num_experts=16, top_k=3, mixed_routing=True)
    with pytest.raises(Unsupported, match="mixed_routing"):
        model.stream(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ShapeError, match="ids"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="top_k"):
        Doge(**OURS, num_experts=16, top_k=17)
    with pytest.raises(Unsupported, match="hidden_act"):
        Doge.from_official({}, hidden_act="gelu")
