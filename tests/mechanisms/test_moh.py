"""MoH: gates token by token in plain Python, budgets, and what it is when all gates are one."""

import pytest
import torch

from regard.errors import ArgumentError, Unsupported
from regard.mechanisms.heads.moh import MixtureOfHeadAttention, convert_mha_to_moh, moh_balance_loss
from regard.mechanisms.softmax import SoftmaxAttention


def module(**config) -> MixtureOfHeadAttention:
    torch.manual_seed(0)
    return MixtureOfHeadAttention(
        **{"dim": 16, "num_heads": 8, "shared_heads": 3, "routed_heads": 2, **config}
    ).double()


def tokens(n: int = 6) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_gates_of_each_token() -> None:
    layer, x = module(), tokens()
    layer(x)
    for b in range(2):
        for t in range(6):
            p = (layer.wg.weight @ x[b, t]).softmax(0)
            best = sorted(range(5), key=lambda i: -p[i])[:2]
            routed = torch.zeros(5, dtype=torch.float64)
            for i in best:
                routed[i] = 2 * p[i] / sum(p[j] for j in best)
            shared = 3 * (layer.wg_1.weight @ x[b, t]).softmax(0)
            a = 2 * (layer.wg_0.weight @ x[b, t]).softmax(0)
            torch.testing.assert_close(layer.last_routing.gates[b, t], torch.cat([a[0] * shared, a[1] * routed]))


@pytest.mark.parametrize(("shared", "routed"), [(0, 3), (1, 2), (3, 2), (8, 0), (2, 6)])
def test_every_token_uses_its_budget_and_gates_have_mean_one(shared: int, routed: int) -> None:
    layer = module(shared_heads=shared, routed_heads=routed)
    layer(tokens())
    gates = layer.last_routing.gates
    assert bool(((gates > 0).sum(-1) == shared + routed).all())
    if shared and routed and shared > 1:
        both = layer.wg_0(tokens()).softmax(-1)
        torch.testing.assert_close(gates.sum(-1), 2 * (both[..., 0] * shared + both[..., 1] * routed))
    elif shared != 1:
        torch.testing.assert_close(gates.sum(-1), torch.full((2, 6), float(shared + routed), dtype=torch.float64))


def test_query_norms_choose_without_weights() -> None:
    layer, x = module(router="query_norm", shared_heads=4), tokens()
    layer(x)
    q = (x @ layer.q_proj.weight.T).unflatten(-1, (8, 2))
    largest = q[:, :, 4:].norm(dim=-1).topk(2, dim=-1).indices
    want = torch.zeros(2, 6, 4, dtype=torch.float64).scatter_(-1, largest, 1.0)
    torch.testing.assert_close(layer.last_routing.gates, torch.cat([torch.ones_like(want), want], -1))
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_with_all_heads_at_one_it_is_multi_head_attention() -> None:
    layer, x = module(router="query_norm", shared_heads=4, routed_heads=4), tokens()
    q, k, v = (p(x).unflatten(-1, (8, 2)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.o_proj(want.transpose(1, 2).flatten(2)))


def test_the_hard_gates_of_training_have_the_gradient_of_their_probabilities() -> None:
    layer, x = module(router="query_norm", shared_heads=4), tokens()
    q = (x @ layer.q_proj.weight.T).unflatten(-1, (8, 2)).transpose(1, 2).detach().requires_grad_()
    gates = layer.route(x, q).gates
    assert torch.equal(gates.detach(), layer.eval().route(x, q).gates)
    norms = q[:, 4:].norm(dim=-1).transpose(1, 2)
    probabilities = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    weights = torch.randn_like(gates)
    (want,) = torch.autograd.grad((probabilities * weights[..., 4:]).sum(), q)
    torch.testing.assert_close(torch.autograd.grad((gates * weights).sum(), q)[0], want)
    assert not layer.route(x, q).gates.requires_grad


@pytest.mark.parametrize("config", [{"rope_theta": 50.0, "num_kv_heads": 2}, {"bias": True, "causal": False}])
def test_multi_head_attention_is_converted_with_its_weights(config: dict) -> None:
    torch.manual_seed(0)
    attn, x = SoftmaxAttention(16, 8, head_dim=4, **config).double().eval(), tokens()
    same = convert_mha_to_moh(attn, 3, 5)
    assert not same.training
    torch.testing.assert_close(same(x), attn(x))
    fewer = convert_mha_to_moh(attn, 3, 1)
    fewer(x)
    assert bool((fewer.last_routing.gates.sum(-1) == 4).all())
    learned = convert_mha_to_moh(attn, 3, 2, router="learned")
    assert torch.equal(learned.v_proj.weight, attn.v_proj.weight)
    assert learned(x).dtype == torch.float64
    learned.o_proj.weight.data.zero_()
    assert bool(attn.o_proj.weight.any())  # the weights are copies


def test_what_cannot_be_converted() -> None:
    for config in ({"window_size": 4}, {"qk_norm": True}):
        with pytest.raises(Unsupported, match="window_size or qk_norm"):
            convert_mha_to_moh(SoftmaxAttention(16, 4, **config), 1, 1)
    with pytest.raises(ArgumentError, match="routed_heads: expected 0 to 3, got 4"):
        convert_mha_to_moh(SoftmaxAttention(16, 4), 1, 4)


def test_equal_norms_do_not_divide_by_zero() -> None:
    layer = module(router="query_norm", shared_heads=4)
    assert bool(layer(torch.zeros(1, 3, 16, dtype=torch.float64)).isfinite().all())


def test_balance_loss_is_least_when_load_is_even() -> None:
    layer = module(shared_heads=0, routed_heads=2)
    with torch.no_grad():
        layer.wg.weight.zero_()
        layer.wg.weight[:2] = 5.0  # all tokens with a positive sum choose the first two
    layer(tokens().abs())
    crowded = moh_balance_loss(layer)
    routing = layer.last_routing
    assert int(routing.mask.sum(-1).unique()) == 2
    even = 8**2 * (1 / 8) * (2 / 8)
    torch.testing.assert_close(crowded, torch.tensor(8.0 * (2 * 0.5 * 1.0), dtype=torch.float64), atol=1e-2, rtol=0)
    assert crowded > even
    crowded.backward()
    assert layer.wg.weight.grad is not None


def test_layers_that_do_not_route_have_no_part_in_the_balance_loss() -> None:
    routing, shared, x = module(), module(shared_heads=8, routed_heads=0), tokens()
    both = torch.nn.Sequential(routing, shared)
    both(x)
    torch.testing.assert_close(moh_balance_loss(both), routing.last_routing.balance_loss)
    assert moh_balance_loss(shared) == 0


def test_gradients() -> None:
    layer = module(shared_heads=2, routed_heads=2, num_heads=4)
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_parameters_of_the_router() -> None:
    plain = 4 * 64 * 64 + 64
    layer = MixtureOfHeadAttention(64, 8, shared_heads=3, routed_heads=2)
    assert sum(p.numel() for p in layer.parameters()) == plain + 64 * (5 + 3 + 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shared_heads": 9}, "shared_heads: expected 0 to 8, got 9"),
        ({"routed_heads": 6}, "routed_heads: expected 0 to 5, got 6"),
        ({"router": "random"}, "router: expected one of"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        module(**config)


def test_there_is_no_loss_without_layers() -> None:
    with pytest.raises(ArgumentError, match="found none"):
        moh_balance_loss(torch.nn.Linear(2, 2))
