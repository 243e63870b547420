"""SinkLoRA's groups against their definition in plain loops, and what the released roll does."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.sparse.sink_lora import ShiftedGroupAttention, group_mask, rolled_group_attention


def module(**config) -> ShiftedGroupAttention:
    torch.manual_seed(0)
    return ShiftedGroupAttention(**{"dim": 16, "num_heads": 4, "group_size": 4, **config})


@pytest.mark.parametrize(("shifted", "sinks"), [(0, 0), (1, 4), (2, 0), (2, 3)])
def test_the_mask_is_its_definition(shifted: int, sinks: int) -> None:
    got = group_mask(4, 6, shifted, sinks).dense(20, 20).expand(1, 4, 20, 20)
    for h in range(4):
        offset = 3 if h >= 4 - shifted else 0
        for i in range(20):
            for j in range(20):
                near = (i + offset) // 6 == (j + offset) // 6
                assert got[0, h, i, j] == (j <= i and (near or j < sinks))


@pytest.mark.parametrize(("ratio", "shifted"), [(0.0, 2), (0.5, 1), (1.0, 0)])
def test_heads_are_put_back_by_ratio(ratio: float, shifted: int) -> None:
    assert module(return_ratio=ratio).shifted_heads == shifted


def test_groups_are_for_training_only() -> None:
    layer = module(num_sinks=0)
    x = torch.randn(2, 12, 16)
    q, k, v = layer.qkv(x)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer.eval()(x), layer.o_proj(full.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)
    mask = group_mask(4, 4, layer.shifted_heads, 0).dense(12, 12)
    grouped = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(layer.train()(x), layer.o_proj(grouped.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


def test_all_heads_back_is_block_diagonal_attention() -> None:
    layer = module(num_sinks=0, return_ratio=1.0).train()
    x = torch.randn(2, 12, 16)
    pieces = torch.cat([layer.eval()(piece) for piece in x.split(4, dim=1)], 1)
    torch.testing.assert_close(layer.train()(x), pieces, atol=1e-6, rtol=1e-5)


def test_training_sees_no_future_but_the_released_roll_does() -> None:
    x = torch.randn(1, 16, 16)
    other = x.clone()
    other[:, -1] += 1.0
    legitimate = module().train()
    torch.testing.assert_close(legitimate(other)[:, :-1], legitimate(x)[:, :-1], atol=0, rtol=0)
    rolled = module(leaky=True, num_sinks=0, return_ratio=0.0).train()
    assert not torch.allclose(rolled(other)[:, :2], rolled(x)[:, :2])


def test_away_from_the_wrap_the_roll_is_the_mask() -> None:
    q, k, v = (torch.randn(2, 4, 16, 3, dtype=torch.float64) for _ in range(3))
    rolled = rolled_group_attention(q, k, v, 4, 2)
    masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, group_mask(4, 4, 2, 0).dense(16, 16))
    torch.testing.assert_close(rolled[:, :, 2:], masked[:, :, 2:])


def test_information_crosses_groups_in_two_layers() -> None:
    mask = group_mask(2, 4, 1, 0).dense(16, 16).view(-1, 16, 16).any(0)
    twice = (mask.int() @ mask.int()) > 0
    assert twice[7, 2]  # through a shifted group
    assert not mask[7, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 5}, "group_size: expected an even number"),
        ({"leaky": True}, "num_sinks"),
        ({"return_ratio": 1.5}, "return_ratio"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        module(**config)


def test_the_roll_needs_groups_that_divide() -> None:
    with pytest.raises(ShapeError, match="must divide"):
        module(leaky=True, num_sinks=0).train()(torch.randn(1, 10, 16))
