"""Masks handed to FlexAttention and to plotly."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from regard import masks
from regard.errors import ArgumentError
from regard.masks import Mask


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.sliding_window(40, causal=True),
        masks.power(16, 2, 1),
        masks.neighborhood((15, 20), (3, 5), (1, 2), (2, 1)),
        masks.documents([100, 50, 150]),
        masks.per_head([masks.causal(), masks.sinks(3)]),
        masks.groups(torch.arange(300) % 3, torch.eye(3).bool()),
    ],
    ids=repr,
)
def test_to_flex_is_what_flex_builds_from_the_whole_matrix(mask: Mask) -> None:
    ours = mask.to_flex(300, block_size=64)
    theirs = create_block_mask(mask, None, mask.heads, 300, 300, device="cpu", BLOCK_SIZE=64)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.seq_lengths == theirs.seq_lengths == (300, 300)


def test_small_plots_show_pairs_and_large_ones_blocks() -> None:
    mask = masks.causal() & (masks.sliding_window(4) | masks.sinks(2))
    (small,) = mask.plot(20).data
    assert (torch.as_tensor(small.z).bool() == mask.dense(20)).all()
    (large,) = mask.plot(1 << 20).data
    assert large.z.shape == (256, 256)
    assert large.dx == 4096


def test_plots_of_a_head_and_refusals() -> None:
    mask = masks.per_head([masks.causal(), masks.full()])
    (heatmap,) = mask.plot(8, head=1).data
    assert (heatmap.z == 2).all()
    with pytest.raises(ArgumentError, match="head must be 0 to 1"):
        mask.plot(8, head=2)
    with pytest.raises(ArgumentError, match="batch must be 0 to 0"):
        mask.plot(8, batch=1)
