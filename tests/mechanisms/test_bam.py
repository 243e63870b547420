"""BAM against a loop over experts, and its language model against its parts and its published sizes."""

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.layers.moe import active_parameters
from regard.mechanisms import SoftmaxAttention
from regard.mechanisms.moe.bam import SoftMixtureOfAttention
from regard.models.language.bam import BAM, router_losses, upcycle


def module(**config) -> SoftMixtureOfAttention:
    torch.manual_seed(0)
    return SoftMixtureOfAttention(**{"dim": 8, "num_heads": 4, "num_experts": 3, **config}).double()


def rotated(v: Tensor, position: int, theta: float | None) -> Tensor:
    if theta is None:
        return v
    half = len(v) // 2
    out = v.clone()
    for i in range(half):
        a = position * theta ** (-i / half)
        out[i] = v[i] * math.cos(a) - v[i + half] * math.sin(a)
        out[i + half] = v[i + half] * math.cos(a) + v[i] * math.sin(a)
    return out


def one_expert(m: SoftMixtureOfAttention, x: Tensor, e: int) -> Tensor:
    """MHA_e of one sequence (N, C), head by head and query by query."""
    d, heads, kv = m.head_dim, m.num_heads, m.num_kv_heads
    wq = m.q_proj.weight[e * heads * d : (e + 1) * heads * d]
    start = 0 if m.share_kv else e * kv * d
    wk, wv = (w.weight[start : start + kv * d] for w in (m.k_proj, m.v_proj))
    wo = m.o_proj.weight[:, e * heads * d : (e + 1) * heads * d]
    rows = []
    for i in range(len(x)):
        out = []
        for h in range(heads):
            g = h // (heads // kv)
            q = rotated(wq[h * d : (h + 1) * d] @ x[i], i, m.rope_theta)
            seen = range(i + 1) if m.causal else range(len(x))
            keys = [rotated(wk[g * d : (g + 1) * d] @ x[j], j, m.rope_theta) for j in seen]
            w = torch.stack([q @ k / d**0.5 for k in keys]).softmax(0)
            out.append(sum(w[n] * (wv[g * d : (g + 1) * d] @ x[j]) for n, j in enumerate(seen)))
        rows.append(wo @ torch.cat(out))
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("config", [{}, {"num_kv_heads": 2, "rope_theta": 10.0}, {"causal": False, "head_dim": 4}])
@pytest.mark.parametrize("share_kv", [False, True])
def test_experts_are_mixed_by_the_gate_of_the_query(share_kv: bool, config, top_k: int | None) -> None:
    m = module(share_kv=share_kv, top_k=top_k, **config)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    g = (x @ m.router.weight.T).softmax(-1)
    if top_k is not None:
        g = torch.stack([row * (row >= row.sort().values[-top_k]) for row in g])
    want = sum(g[:, e : e + 1] * one_expert(m, x, e) for e in range(3))
    got = m(x[None])[0]
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6)  # the angles are float32
    inputs = (x, *m.parameters())
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_gradcheck() -> None:
    m = module(num_kv_heads=2, rope_theta=10.0)
    assert torch.autograd.gradcheck(m, (torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("share_kv", [False, True])
def test_equal_experts_are_one_attention(share_kv: bool) -> None:
    torch.manual_seed(0)
    dense = SoftmaxAttention(8, 4, 2, rope_theta=10.0)
    mixed = SoftMixtureOfAttention.from_dense([dense] * 3, share_kv)
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(mixed(x), dense(x), atol=1e-6, rtol=1e-5)
    one = SoftMixtureOfAttention.from_dense([dense], share_kv)
    torch.testing.assert_close(one(x), dense(x), atol=1e-6, rtol=1e-5)


def test_the_cache_is_as_large_as_the_keys() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    assert module(num_kv_heads=2).stream(x)[1].key.shape == (1, 6, 5, 2)
    assert module(num_kv_heads=2, share_kv=True).stream(x)[1].key.shape == (1, 2, 5, 2)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_experts": 1}, 587_209_728),
        ({"attention": "average"}, 700_480_512),
        ({}, 776_002_560),
        ({"share_kv": True}, 738_253_824),
    ],
)
def test_published_parameter_counts(config, count: int) -> None:
    with torch.device("meta"):
        model = BAM(**{**BAM.sizes["bam-small"], **config})
    assert sum(p.numel() for p in model.parameters()) == count
    if not config:  # the paper's 662,731,776 leaves one of the two routers of each block out
        assert active_parameters(model) == 662_731_776 + 6 * 4 * 1024


def dense(seed: int, **config) -> BAM:
    torch.manual_seed(seed)
    return BAM(
        **{"vocab_size": 11, "dim": 8, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "num_experts": 1, **config}
    )


IDS = torch.tensor([[1, 5, 3, 9, 2, 0], [4, 4, 7, 1, 8, 10]])


@pytest.mark.parametrize("share_kv", [False, True])
def test_equal_models_upcycle_to_themselves_if_gates_are_normalised(share_kv: bool) -> None:
    seed = dense(0)
    same = upcycle([seed, seed, seed], share_kv, normalise_top_k=True)
    torch.testing.assert_close(same(IDS), seed(IDS), atol=1e-5, rtol=1e-5)
    published = upcycle([seed, seed, seed], share_kv)
    assert not torch.allclose(published(IDS), seed(IDS), atol=1e-3)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("attention", ["experts", "average"])
def test_upcycling_copies_experts_and_averages_the_rest(attention, tie: bool, tmp_path) -> None:
    models = [dense(seed, tie_embeddings=tie) for seed in range(3)]
    with torch.no_grad():
        for model in models:
            model.norm.weight.normal_()
            for block in model.blocks:
                block.norm.weight.normal_()
    mixed = upcycle(models, attention=attention, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mixed.norm.weight, sum(m.norm.weight for m in models) / 3)
    torch.testing.assert_close(mixed.embedding.weight, sum(m.embedding.weight for m in models) / 3)
    assert (mixed.head.weight is mixed.embedding.weight) == tie
    x = torch.randn(2, 6, 8)
    for layer, block in enumerate(mixed.blocks):
        each = [m.blocks[layer] for m in models]
        torch.testing.assert_close(block.norm.weight, sum(b.norm.weight for b in each) / 3)
        for expert, b in zip(block.mlp.experts, each, strict=True):
            torch.testing.assert_close(expert(x), b.mlp(x))
        if attention == "experts":
            g = block.mixer.router(x).softmax(-1)
            want = sum(g[..., e : e + 1] * b.mixer(x) for e, b in enumerate(each))
            torch.testing.assert_close(block.mixer(x), want, atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(block.mixer.o_proj.weight, sum(b.mixer.o_proj.weight for b in each) / 3)
    mixed.save_pretrained(tmp_path)
    torch.testing.assert_close(BAM.from_pretrained(tmp_path)(IDS), mixed(IDS), atol=0, rtol=0)


def test_the_block_is_parallel_and_the_losses_are_of_the_feed_forward_routers() -> None:
    model = upcycle([dense(seed) for seed in range(2)])
    block = model.blocks[0]
    x = torch.randn(2, 6, 8)
    h = torch.nn.functional.layer_norm(x, (8,), block.norm.weight)
    torch.testing.assert_close(block(x), x + block.mixer(h) + block.mlp(h))
    model(IDS)
    loss = router_losses(model)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    reached = {name for (name, _), grad in zip(model.named_parameters(), grads, strict=True) if grad is not None}
    assert {f"blocks.{layer}.mlp.router.gate.weight" for layer in range(2)} <= reached
    assert "blocks.1.mixer.router.weight" not in reached


@pytest.mark.parametrize("config", [{"num_experts": 1}, {"num_experts": 3, "share_kv": True}, {"num_experts": 3}])
def test_streaming_and_generation(config) -> None:
    model = dense(0, **config)
    whole = model(IDS)
    first, state = model.stream(IDS[:, :2])
    second, _ = model.stream(IDS[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    ids = IDS
    for _ in range(3):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(IDS, 3), ids)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="num_experts: expected at least 1"):
        module(num_experts=0)
    with pytest.raises(ArgumentError, match="top_k: expected 1 to 3"):
        module(top_k=4)
    with pytest.raises(ArgumentError, match="one configuration"):
        SoftMixtureOfAttention.from_dense([SoftmaxAttention(8, 4), SoftmaxAttention(8, 2)])
    with pytest.raises(ArgumentError, match="without biases"):
        SoftMixtureOfAttention.from_dense([SoftmaxAttention(8, 4, bias=True)] * 2)
    with pytest.raises(ArgumentError, match="attention: expected"):
        dense(0, attention="some")
    with pytest.raises(ArgumentError, match="share_kv"):
        dense(0, attention="average", share_kv=True)
    with pytest.raises(ArgumentError, match="two or more"):
        upcycle([dense(0)])
    with pytest.raises(ArgumentError, match="two or more"):
        upcycle([dense(0), dense(0, num_experts=2)])
    with pytest.raises(ArgumentError, match="same sizes"):
        upcycle([dense(0), dense(0, dim=16)])
