"""Mixtures of experts against a loop over tokens."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.layers import SwiGLU
from regard.layers.moe import (
    Routing,
    SparseMoE,
    TopKRouter,
    active_parameters,
    load_balancing_loss,
    router_losses,
    router_z_loss,
)


def layer(experts: int = 4, top_k: int = 2, normalise: bool = False) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(TopKRouter(6, experts, top_k, normalise), [SwiGLU(6, 8) for _ in range(experts)]).double()


def by_token(moe: SparseMoE, x: Tensor, top_k: int, normalise: bool) -> Tensor:
    y = torch.zeros_like(x)
    for b, i in ((b, i) for b in range(x.shape[0]) for i in range(x.shape[1])):
        p = (moe.router.gate.weight @ x[b, i]).softmax(0).tolist()
        chosen = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
        total = sum(p[e] for e in chosen) if normalise else 1.0
        y[b, i] = sum(p[e] / total * moe.experts[e](x[b, i][None])[0] for e in chosen)
    return y


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_token_gets_its_experts(top_k: int, normalise: bool) -> None:
    moe = layer(top_k=top_k, normalise=normalise)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(moe(x), by_token(moe, x, top_k, normalise), atol=1e-12, rtol=1e-10)


def test_gradients_reach_router_experts_and_tokens() -> None:
    moe = layer(top_k=3)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, (x,))
    moe(x).square().sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    weight = moe.router.gate.weight
    (want,) = torch.autograd.grad(torch.stack([moe(x).square().sum()]), weight)
    assert want.abs().max() > 0


def test_an_expert_sees_only_its_tokens_and_is_called_even_on_none() -> None:
    counts = []

    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            counts.append(len(x))
            return super().forward(x)

    moe = SparseMoE(TopKRouter(2, 3), [Counts(2, 2) for _ in range(3)])
    nn.init.zeros_(moe.router.gate.weight)
    with torch.no_grad():
        moe.router.gate.weight[0, 0] = moe.router.gate.weight[1, 1] = 1.0
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    moe(x).sum().backward()
    assert counts == [2, 1, 0]
    assert all(p.grad is not None for p in moe.parameters())


def test_losses_are_their_definitions() -> None:
    moe = layer(top_k=2)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    moe(x, valid=valid)
    tokens = [x[b, i] for b in range(2) for i in range(5) if valid[b, i]]
    logits = [moe.router.gate.weight @ t for t in tokens]
    chosen = [e for z in logits for e in z.topk(2).indices.tolist()]
    balance = 4 * sum(
        chosen.count(e) / len(chosen) * sum(z.softmax(0)[e] for z in logits) / len(logits) for e in range(4)
    )
    z_loss = sum(z.exp().sum().log() ** 2 for z in logits) / len(logits)
    torch.testing.assert_close(load_balancing_loss(moe.last_routing), balance)
    torch.testing.assert_close(router_z_loss(moe.last_routing), z_loss)
    stack = nn.Sequential(moe, nn.Identity())
    torch.testing.assert_close(router_losses(stack, 0.1, 0.2), 0.1 * balance + 0.2 * z_loss)


def test_a_balanced_router_has_loss_one() -> None:
    indices = torch.arange(4).view(1, 4, 1)
    probs = torch.full((1, 4, 4), 0.25)
    routing = Routing(indices, torch.ones(1, 4, 1), probs, probs)
    assert load_balancing_loss(routing).item() == 1.0


def test_a_layer_that_has_run_can_be_copied() -> None:
    moe = layer()
    moe(torch.randn(1, 3, 6, dtype=torch.float64))
    assert deepcopy(moe).last_routing is None
    assert moe.last_routing is not None


def test_active_parameters() -> None:
    assert active_parameters(layer(top_k=2)) == 4 * 6 + 2 * 3 * 6 * 8


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="top_k: expected 1 to 2"):
        TopKRouter(4, 2, 3)
    with pytest.raises(ArgumentError, match="found none"):
        router_losses(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="found none"):
        router_losses(layer())
