"""The tracked layer and the size of caches."""

import pytest
import torch
from transformers import DynamicCache

from regard.cache import Slots, TrackedLayer, nbytes
from regard.errors import ArgumentError
from regard.positions import rotate
from regard.sites import Step


def filled(batch=2, heads=2, tokens=6, pad=0, raw_keys=False):
    """A layer with `tokens` tokens, the first row's `pad` of them padding, and what went in."""
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(batch, heads, tokens, 4, generator=g) for _ in range(2))
    angles = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, :pad] = False
    layer = TrackedLayer(raw_keys)
    layer.begin(
        Step(torch.arange(tokens)[None], angles.cos()[None, None], angles.sin()[None, None], valid if pad else None)
    )
    layer.update(rotate(key, angles.cos(), angles.sin()), value)
    return layer, key, value


def test_keys_before_rotation():
    layer, key, value = filled(raw_keys=True)
    torch.testing.assert_close(layer.keys, key)
    assert torch.equal(layer.values, value)


def test_slots_know_positions_and_padding():
    layer, _, _ = filled(pad=2)
    layer.begin(Step(torch.tensor([[6]])))
    layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert layer.slots.positions.tolist() == [[list(range(7))]] * 2
    assert layer.slots.valid[:, 0].tolist() == [[False, False, True, True, True, True, True], [True] * 7]
    assert layer.length == layer.seen == layer.get_seq_length() == 7


def test_heads_may_keep_different_slots():
    layer, key, value = filled()
    before = layer.keys
    layer.keep(torch.tensor([[[0, 2, 5], [1, 2, 3]]]))
    assert torch.equal(layer.keys[1, 1], before[1, 1, [1, 2, 3]])
    assert torch.equal(layer.values[0, 0], value[0, 0, [0, 2, 5]])
    assert layer.slots.positions.tolist() == [[[0, 2, 5], [1, 2, 3]]] * 2
    layer.keep(torch.tensor([[[0, 2]]]))  # one choice for all, after the heads differ
    assert layer.slots.positions.tolist() == [[[0, 5], [1, 3]]] * 2
    layer.begin(Step(torch.tensor([[6], [6]])))
    layer.update(key[:, :, :1], value[:, :, :1])
    assert layer.slots.positions.tolist() == [[[0, 5, 6], [1, 3, 6]]] * 2
    assert (layer.length, layer.seen) == (3, 7)
    assert layer.get_mask_sizes(2) == (9, 0)  # what layers that hold everything need


def test_rows_may_keep_different_slots():
    layer, _, value = filled()
    layer.keep(torch.tensor([[[0, 1]], [[4, 5]]]))
    assert layer.slots.positions.tolist() == [[[0, 1]], [[4, 5]]]
    assert torch.equal(layer.values[1], value[1, :, 4:])


def test_only_inside_apply():
    with pytest.raises(ArgumentError, match="TrackedLayer works inside"):
        TrackedLayer().update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


class TestBytes:
    def test_a_plain_cache(self):
        cache = DynamicCache()
        for layer in range(3):
            cache.update(torch.zeros(2, 2, 5, 4).half(), torch.zeros(2, 2, 5, 8).half(), layer)
        assert nbytes(cache) == 3 * 2 * 2 * 5 * (4 + 8) * 2

    def test_a_policy_counts_its_bookkeeping(self):
        layer, *_ = filled(pad=1)
        assert nbytes(layer) == 2 * (2 * 2 * 6 * 4 * 4) + 6 * 4 + 2 * 6  # positions are the same for both rows
        layer.keep(torch.tensor([[[0, 1]]]))
        assert nbytes(layer) == 2 * (2 * 2 * 2 * 4 * 4) + 2 * 2 * 4 + 2 * 2

    def test_shared_storage_counts_once_and_a_view_counts_its_buffer(self):
        buffer = torch.zeros(100)
        layer = TrackedLayer()
        layer.keys, layer.values = buffer[:10], buffer[10:20]
        assert nbytes(layer) == 400

    def test_nothing_yet(self):
        assert nbytes(DynamicCache()) == 0
        assert nbytes(TrackedLayer()) == 0

    def test_slots_are_part_of_the_layer(self):
        layer = TrackedLayer()
        layer.slots = Slots(torch.zeros(1, 1, 7, dtype=torch.int32), None)
        assert nbytes(layer) == 28
