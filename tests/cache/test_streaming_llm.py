"""Which slots StreamingLLM keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.cache import SinkLayer, evict, evict_for_space, evict_range
from regard.errors import ArgumentError
from regard.sites import Step

sizes = st.integers(0, 12)


@given(length=st.integers(0, 30), start=sizes, recent=sizes)
def test_evict_keeps_the_ends(length, start, recent):
    slots = list(range(length))
    expected = slots if length <= start + recent else slots[:start] + slots[length - recent :]
    assert evict(length, start, recent).tolist() == expected


@given(length=st.integers(0, 30), coming=sizes, start=sizes, recent=sizes)
def test_evict_for_space_leaves_room(length, coming, start, recent):
    slots = list(range(length))
    fits = length + coming <= start + recent
    expected = slots if fits else slots[:start] + slots[max(length - recent + coming, 0) :]
    kept = evict_for_space(length, coming, start, recent).tolist()
    assert kept == expected
    if coming <= recent:
        assert len(kept) + coming <= max(start + recent, length + coming if fits else 0)


@given(length=st.integers(0, 30), a=st.integers(0, 30), b=st.integers(0, 30))
def test_evict_range_drops_it(length, a, b):
    if not a <= b <= length:
        with pytest.raises(ArgumentError, match="expected 0 <= start <= end"):
            evict_range(length, a, b)
    else:
        assert evict_range(length, a, b).tolist() == [*range(a), *range(b, length)]


@given(pad=st.integers(0, 20), start=st.integers(0, 5), recent=st.integers(1, 8), coming=st.integers(0, 3))
def test_each_row_keeps_its_own_ends(pad, start, recent, coming):
    tokens = 20
    layer = SinkLayer(start, recent)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, :pad] = False
    angles = torch.ones(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4)
    layer.begin(Step(torch.arange(tokens)[None], *angles, valid))
    layer.update(torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 4))
    layer.evict_for_space(coming) if coming else layer.evict()
    for row, real in enumerate((list(range(pad, tokens)), list(range(tokens)))):
        room = max(recent - coming, 0)
        expected = real if len(real) <= start + room else real[:start] + real[len(real) - room :]
        positions, valid = layer.slots.positions[row, 0], layer.slots.valid[row, 0]
        assert positions[valid].tolist() == expected
    assert layer.keys.shape[2] == layer.length
