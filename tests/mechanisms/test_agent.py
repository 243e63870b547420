"""Agent attention against its two softmaxes, its pooling, its grids and AgentSD."""

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.linear.agent import AgentAttention, agent_attention, mean_of_pieces, resize
from regard.mechanisms.linear.agent_merge import MergedAgentAttention


def test_it_is_two_softmaxes() -> None:
    torch.manual_seed(0)
    q, k, v, a = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (7, 9, 9, 3))
    b1, b2 = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    want = (0.7 * q @ a.mT + b2).softmax(-1) @ ((0.5 * a @ k.mT + b1).softmax(-1) @ v)
    got = agent_attention(q, k, v, a, bias_agents=b1, bias_queries=b2, scale=0.5, scale_queries=0.7)
    torch.testing.assert_close(got, want)


def test_weights_of_a_row_sum_to_one() -> None:
    torch.manual_seed(0)
    q, a = torch.randn(1, 1, 7, 4), torch.randn(1, 1, 3, 4)
    rows = agent_attention(q, q, torch.eye(7)[None, None], a)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 1, 7))


def test_as_many_agents_as_tokens_are_the_queries() -> None:
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(mean_of_pieces(x, 6)[0], x)
    means, filled = mean_of_pieces(x, 9)
    torch.testing.assert_close(means[:, :6], x)
    assert filled.tolist() == [[True] * 6 + [False] * 3] * 2


def test_pieces_leave_padding_out() -> None:
    x = torch.arange(8.0).view(1, 8, 1)
    valid = torch.tensor([[True, False, True, True, False, True, True, True]])
    means, filled = mean_of_pieces(x, 3, valid)
    assert means.flatten().tolist() == [1.0, 4.0, 6.5]  # of 0 2 | 3 5 | 6 7
    assert filled.all()


def test_the_grid_layer_written_out() -> None:
    torch.manual_seed(0)
    layer = AgentAttention(8, 2, 4, grid=(4, 6)).double()
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    pooled = q.view(1, 2, 2, 2, 3, 8).mean((2, 4)).view(1, 4, 8)
    b1, b2 = layer.biases()
    out = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        gathered = (pooled[0, :, part] @ k[0, :, part].mT / 2 + b1[h]).softmax(-1) @ v[0, :, part]
        out.append((q[0, :, part] @ pooled[0, :, part].mT / 2 + b2[h]).softmax(-1) @ gathered)
    image = v.mT.view(1, 8, 4, 6)
    local = F.conv2d(image, layer.dwc.weight, layer.dwc.bias, padding=1, groups=8).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.o_proj(torch.cat(out, -1) + local))


def test_resizing_keeps_the_size_and_the_constant() -> None:
    layer = AgentAttention(8, 2, 4, grid=(4, 4), class_token=True)
    same, larger = resize(layer, (4, 4)), resize(layer, (6, 5))
    x = torch.randn(1, 17, 8)
    torch.testing.assert_close(same(x), layer(x))
    assert larger(torch.randn(1, 31, 8)).shape == (1, 31, 8)
    with torch.no_grad():
        for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias"):
            getattr(layer.biases, name).fill_(0.5)
    for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias"):
        assert getattr(resize(layer, (6, 5)).biases, name).eq(0.5).all()


def test_merging_nothing_with_many_agents_is_attention() -> None:
    torch.manual_seed(0)
    layer = MergedAgentAttention(8, 2, (2, 2), ratio=0.0, agent_ratio=0.0)
    x = torch.randn(2, 16, 8)
    q, k, v = (p(x).view(2, 16, 2, 4).transpose(1, 2) for p in (layer.to_q, layer.to_k, layer.to_v))
    want = layer.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, (4, 4)), want)


def test_gradients() -> None:
    torch.manual_seed(0)
    for layer in (AgentAttention(4, 2, 3), AgentAttention(4, 2, 4, grid=(2, 3))):
        x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer.double(), (x,))


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="num_agents"):
        AgentAttention(8, 2, 5, grid=(4, 4))
    with pytest.raises(ArgumentError, match="grid: needed"):
        AgentAttention(8, 2, class_token=True)
    with pytest.raises(ArgumentError, match="kv_reduction"):
        AgentAttention(8, 2, 4, grid=(3, 4), kv_reduction=2)
    with pytest.raises(ArgumentError, match="kernel_size"):
        AgentAttention(8, 2, kernel_size=2)
    with pytest.raises(ArgumentError, match="for sequences"):
        resize(AgentAttention(8, 2), (4, 4))
    layer = AgentAttention(8, 2, 4, grid=(2, 3))
    with pytest.raises(ShapeError, match="2 x 3 tokens, got 7"):
        layer(torch.randn(1, 7, 8))
    with pytest.raises(Unsupported, match="padding"):
        layer(torch.randn(1, 6, 8), valid=torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="variant"):
        regard.from_official("agent-attention", {}, variant="cswin", dim=8)
    with pytest.raises(ArgumentError, match="ratio"):
        MergedAgentAttention(8, 2, ratio=1.0)
