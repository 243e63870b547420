"""Routing by graphs of tokens against two nested loops, and the identities of its definition."""

import pytest
import torch
from torch import Tensor, nn

from regard import masks
from regard.errors import ArgumentError, ShapeError
from regard.layers.moe import router_losses
from regard.mechanisms.moe.similarity import AttentionAwareRouter, SimilarityAwareMoE, SimilarityAwareRouter
from regard.models.language.moe import MoELanguageModel
from regard.probes import routing_entropy, routing_fluctuation


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module.double()


def router(**config) -> SimilarityAwareRouter:
    return randomised(SimilarityAwareRouter(**{"dim": 6, "num_experts": 4, **config}))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def votes(r: nn.Module, u: Tensor) -> Tensor:
    return (r.gate.weight @ u + r.gate.bias).softmax(0)


def chosen(p: Tensor, k: int) -> tuple[list[int], Tensor]:
    best = sorted(range(len(p)), key=lambda e: -p[e].item())[:k]
    return best, p[best] / p[best].sum()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_choices_are_averaged_by_similarity(causal: bool, rank: int | None) -> None:
    r, u = router(causal=causal, rank=rank, temperature=0.7), tokens(2, 5, 6)
    routing = r(u)
    ws = r.query.weight.T if rank is None else r.query.weight.T @ r.key.weight
    for b in range(2):
        for i in range(5):
            seen = range(i + 1) if causal else range(5)
            s = torch.stack([u[b, i] @ ws @ u[b, j] / (0.7 * 6**0.5) for j in seen]).softmax(0)
            p = sum(s[n] * votes(r, u[b, j]) for n, j in enumerate(seen))
            torch.testing.assert_close(routing.probs[b, i], p, atol=1e-12, rtol=1e-10)
            indices, weights = chosen(p, 2)
            assert routing.indices[b, i].tolist() == indices
            torch.testing.assert_close(routing.weights[b, i], weights, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(2, 5, dtype=torch.float64))


def attend(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """(H, N, N) weights of one sequence."""
    s = q @ k.repeat_interleave(len(q) // len(k), 0).mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[1:]).triu(1).bool(), -torch.inf)
    return s.softmax(-1)


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("head_mix", ["mean", "learned"])
@pytest.mark.parametrize("causal", [False, True])
def test_choices_are_averaged_by_attention(causal: bool, head_mix, posterior: bool) -> None:
    r = randomised(AttentionAwareRouter(6, 4, 2, 4, head_mix, posterior, sigma=1.3))
    u, q, k, m = tokens(1, 5, 6), tokens(1, 4, 5, 3), tokens(1, 2, 5, 3), tokens(1, 4, 5, 6)
    a = attend(q[0], k[0], causal)
    pi = torch.full((4,), 0.25) if head_mix == "mean" else r.head_logits.softmax(0)
    routing = r(u, q, k, m if posterior else None, mask=masks.causal() if causal else None)
    for i in range(5):
        share = torch.zeros(4, 5, dtype=torch.float64)
        for h in range(4):
            for j in range(5):
                share[h, j] = pi[h] * a[h, i, j]
                if posterior:
                    share[h, j] *= torch.exp(-(u[0, i] - m[0, h, j]).square().sum() / (2 * 1.3**2))
        share = share / share.sum()
        p = sum(share[h, j] * votes(r, u[0, j]) for h in range(4) for j in range(5))
        torch.testing.assert_close(routing.probs[0, i], p, atol=1e-12, rtol=1e-10)
        assert routing.indices[0, i].tolist() == chosen(p, 2)[0]


def test_alone_or_unlike_all_others_a_token_decides_by_itself() -> None:
    r, u = router(), tokens(3, 1, 6)
    torch.testing.assert_close(r(u).probs, r.votes(u))
    cold = router(temperature=1e-4)
    nn.init.eye_(cold.query.weight)
    distinct = torch.eye(6, dtype=torch.float64)[None]
    torch.testing.assert_close(cold(distinct).probs, cold.votes(distinct), atol=1e-12, rtol=0)


def test_order_does_not_matter_without_a_mask() -> None:
    layer = randomised(SimilarityAwareMoE(6, 4, 2, 5, causal=False))
    u, order = tokens(2, 7, 6), torch.randperm(7)
    torch.testing.assert_close(layer(u[:, order]), layer(u)[:, order])


def test_experts_are_weighted_by_the_routing() -> None:
    layer = randomised(SimilarityAwareMoE(6, 4, 2, 5))
    u = tokens(1, 6, 6)
    routing, y = layer.moe.router(u), layer(u)
    for i in range(6):
        picked = zip(routing.weights[0, i], routing.indices[0, i], strict=True)
        want = sum(w * layer.moe.experts[e](u[0, i][None])[0] for w, e in picked)
        torch.testing.assert_close(y[0, i], want)


def test_averaging_contracts_disagreement() -> None:
    """Total variation between any two tokens' distributions is at most the largest between their votes."""
    r, u = router(), tokens(1, 9, 6)

    def spread(p: Tensor) -> float:
        return torch.cdist(p[0], p[0], p=1).max().item() / 2

    assert spread(r(u).probs) < spread(r.votes(u))


def test_gradients() -> None:
    r, u = router(causal=True), tokens(1, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, *_: r(u).probs, (u, *r.parameters()))
    r = randomised(AttentionAwareRouter(6, 4, 2, 2, "learned", posterior=True))
    inputs = tuple(
        t.requires_grad_() for t in (tokens(1, 3, 6), tokens(1, 2, 3, 4), tokens(1, 2, 3, 4), tokens(1, 2, 3, 6))
    )
    assert torch.autograd.gradcheck(lambda *args: r(*args).probs, inputs)


def test_attention_can_be_left_out_of_the_gradient() -> None:
    for detach in (False, True):
        r = randomised(AttentionAwareRouter(6, 4, detach_attention=detach))
        q = tokens(1, 2, 3, 4).requires_grad_()
        probs = r(tokens(1, 3, 6), q, tokens(1, 2, 3, 4)).probs
        (grad,) = torch.autograd.grad(probs.square().sum(), q, allow_unused=True)
        assert (grad is None) == detach


def test_cost_in_parameters() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    base = 16 * 4 + 4
    assert count(SimilarityAwareRouter(16, 4)) == base + 16**2
    assert count(SimilarityAwareRouter(16, 4, rank=3)) == base + 2 * 16 * 3
    assert count(AttentionAwareRouter(16, 4)) == base


@pytest.mark.parametrize("routing", ["token", "similarity", "attention", "posterior"])
def test_the_language_model_is_causal_streams_and_pads(routing) -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(11, 16, 2, 4, 2, routing=routing, hidden_dim=8, head_mix="learned").double()
    ids = torch.randint(11, (2, 9))
    whole = model(ids)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 11
    torch.testing.assert_close(model(other)[:, :6], whole[:, :6])
    first, state = model.stream(ids[:, :4])
    second, _ = model.stream(ids[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    padded = model(ids, valid)
    torch.testing.assert_close(padded[1, :6], model(ids[1:, :6])[0])
    left = model(ids, valid.flip(1))
    assert left.isfinite().all()
    (left.square().mean() + router_losses(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_models_attention_routing_is_that_of_its_heads() -> None:
    """By the definition, with the weights of the block's attention written out."""
    torch.manual_seed(0)
    model = MoELanguageModel(11, 8, 1, 4, 2, routing="posterior", hidden_dim=8, sigma=2.0, rope_theta=None).double()
    ids = torch.randint(11, (1, 6))
    model(ids)
    block = model.blocks[0]
    h = block.norm1(model.embedding(ids))
    q, k, v = (
        p(h)[0].unflatten(-1, (-1, 2)).transpose(0, 1)
        for p in (block.mixer.q_proj, block.mixer.k_proj, block.mixer.v_proj)
    )
    a = attend(q, k, True)
    v = v.repeat_interleave(2, 0)
    u = block.norm2(model.embedding(ids) + block.mixer.o_proj((a @ v).transpose(0, 1).flatten(1))[None])[0]
    messages = torch.stack([v[i] @ block.mixer.o_proj.weight[:, 2 * i : 2 * i + 2].T for i in range(4)])
    near = torch.exp(-(u[None, :, None] - messages[:, None]).square().sum(-1) / 8)
    share = a * near
    share = share / share.sum((0, 2), keepdim=True)
    want = share.sum(0) @ block.moe.router.votes(u)
    torch.testing.assert_close(block.moe.last_routing.probs[0], want)


def test_an_encoder_classifies() -> None:
    model = MoELanguageModel(11, 16, 1, routing="similarity", causal=False, num_classes=3)
    assert model(torch.randint(11, (2, 5))).shape == (2, 3)


def test_probes() -> None:
    before = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3]])
    after = torch.tensor([[1, 0], [2, 1], [1, 2], [1, 2]])
    assert routing_fluctuation(before, after).item() == 0.5
    assert routing_fluctuation(before, after, torch.tensor([True, False, True, True])).item() == pytest.approx(1 / 3)
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert routing_entropy(probs).item() == pytest.approx(torch.tensor(2.0).log().item() / 2)
    assert routing_entropy(probs, torch.tensor([True, False])).item() == 0
    with pytest.raises(ShapeError, match="new_indices"):
        routing_fluctuation(before, after[:2])


def test_refusals() -> None:
    for config, message in (
        ({"top_k": 5}, "top_k: expected 1 to 4"),
        ({"temperature": 0}, "temperature"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(ArgumentError, match=message):
            router(**config)
    with pytest.raises(ArgumentError, match="num_heads"):
        AttentionAwareRouter(6, 4, head_mix="learned")
    with pytest.raises(ArgumentError, match="head_mix"):
        AttentionAwareRouter(6, 4, head_mix="max")
    with pytest.raises(ArgumentError, match="sigma"):
        AttentionAwareRouter(6, 4, sigma=0)
    with pytest.raises(ShapeError, match="messages"):
        AttentionAwareRouter(6, 4, posterior=True).double()(tokens(1, 3, 6), tokens(1, 2, 3, 4), tokens(1, 2, 3, 4))
    r = AttentionAwareRouter(6, 4, num_heads=4, head_mix="learned").double()
    with pytest.raises(ShapeError, match="expected 4 heads"):
        r(tokens(1, 3, 6), tokens(1, 2, 3, 4), tokens(1, 2, 3, 4))
    with pytest.raises(ArgumentError, match="routing"):
        MoELanguageModel(11, routing="hash")
