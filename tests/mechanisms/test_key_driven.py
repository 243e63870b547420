"""Key-driven GQA: allocations, groups in plain loops, conversion and noise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.heads.key_driven import (
    KeyDrivenGQA,
    allocate_by_norm,
    allocate_by_weight,
    grouped_attention,
    key_magnitudes,
    mean_pool_kv_heads,
    output_noise,
)

positive = st.floats(0.0, 100.0, allow_nan=False)


@given(st.lists(positive, min_size=1, max_size=6), st.integers(1, 16))
def test_allocations_are_whole_and_complete(values: list[float], num_heads: int) -> None:
    magnitudes = torch.tensor(values)
    for got in (
        allocate_by_norm(magnitudes, num_heads * len(values)),
        allocate_by_weight(magnitudes, num_heads * len(values), generator=torch.Generator().manual_seed(0)),
        allocate_by_weight(magnitudes, num_heads * len(values), repair="greedy"),
    ):
        assert int(got.sum()) == num_heads * len(values)
        assert int(got.min()) >= 0
    again = allocate_by_norm(magnitudes, num_heads * len(values))
    assert torch.equal(again, allocate_by_norm(magnitudes, num_heads * len(values)))


@pytest.mark.parametrize(
    ("magnitudes", "want"),
    [
        ([1.0, 2.0, 3.0, 4.0], [0, 1, 3, 4]),  # 0, 1.33, 2.67, 4
        ([5.0, 5.0], [4, 4]),
        ([0.0, 1.0], [0, 8]),
    ],
)
def test_allocation_by_norm(magnitudes: list[float], want: list[int]) -> None:
    got = allocate_by_norm(torch.tensor(magnitudes), 8)
    assert got.tolist() == want


def test_lack_goes_to_the_smallest_and_surplus_comes_off_the_largest() -> None:
    # 0, 0.5, 0.5, 1 of 5 heads: 0, 1.25, 1.25, 2.5 -> 0, 1, 1, 2 (half to even), one short
    assert allocate_by_norm(torch.tensor([0.0, 0.5, 0.5, 1.0]), 5).tolist() == [1, 1, 1, 2]
    # 0, 0.75, 1, 0.75 of 10: 0, 3, 4, 3 exactly; of 9: 0, 2.7, 3.6, 2.7 -> 0, 3, 4, 3, one too many
    assert allocate_by_norm(torch.tensor([0.0, 0.75, 1.0, 0.75]), 9).tolist() == [0, 3, 3, 3]


def test_groups_in_a_loop() -> None:
    q, k, v = (torch.randn(2, h, 5, 4, dtype=torch.float64) for h in (6, 3, 3))
    got = grouped_attention(q, k, v, torch.tensor([1, 0, 5]))
    owners = [0, 2, 2, 2, 2, 2]
    for h, g in enumerate(owners):
        weights = (q[:, h] @ k[:, g].mT / 2).softmax(-1)
        torch.testing.assert_close(got[:, h], weights @ v[:, g])
    with pytest.raises(ShapeError, match="sum to 6"):
        grouped_attention(q, k, v, torch.tensor([1, 1, 1]))


def test_magnitudes_leave_padding_out() -> None:
    k = torch.randn(2, 3, 6, 4)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    want = [k[0, g].norm() + k[1, g, :4].norm() for g in range(3)]
    torch.testing.assert_close(key_magnitudes(k, valid), torch.stack(want))


def test_larger_keys_serve_more_heads() -> None:
    torch.manual_seed(0)
    layer = KeyDrivenGQA(16, 8, 2)
    with torch.no_grad():
        layer.k_proj.weight[2:] *= 5  # the second key head
    layer(torch.randn(2, 7, 16))
    assert layer.last_allocation.tolist() == [0, 8]


def test_the_window_of_training_steps() -> None:
    torch.manual_seed(0)
    layer = KeyDrivenGQA(16, 8, 4, scheme="dgqa_ema", window_size=3).train()
    changed = []
    for _ in range(7):
        before = layer.magnitudes.clone()
        layer(torch.randn(2, 7, 16))
        changed.append(not torch.equal(before, layer.magnitudes))
    assert changed == [True, False, False, True, False, False, True]


def test_noise_has_the_moments_of_the_outputs() -> None:
    out = torch.randn(2, 3, 5, 4) * 3 + 1
    noise = output_noise(out, torch.Generator().manual_seed(0))
    rows = out.flatten(2)
    torch.testing.assert_close(noise.mean(2), rows.mean(2))
    torch.testing.assert_close(noise.std(2), rows.std(2))


def test_pooling_a_multi_head_attention() -> None:
    weight = torch.randn(8 * 3, 5)
    got = mean_pool_kv_heads(weight, 8, 2)
    want = torch.cat([sum(weight[h * 3 : h * 3 + 3] for h in group) / 4 for group in (range(4), range(4, 8))])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"scheme": "best"}, ArgumentError, "scheme: expected one of"),
        ({"num_kv_heads": 3}, ArgumentError, "num_kv_heads: 3 key heads do not divide 4"),
        ({"allocation": [1, 1]}, ArgumentError, "allocation: expected 2 numbers of heads that sum to 4"),
        ({"causal": True}, Unsupported, "looks at all tokens"),
    ],
)
def test_bad_arguments(config, error, message) -> None:
    with pytest.raises(error, match=message):
        KeyDrivenGQA(**{"dim": 16, "num_heads": 4, "num_kv_heads": 2, **config})
