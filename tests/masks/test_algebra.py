"""What masks simplify to, how they print, what they carry, and what they refuse."""

import pytest
import torch

from regard import masks
from regard.errors import ArgumentError, ShapeError


def test_neutral_parts_and_doubles_disappear() -> None:
    window = masks.sliding_window(4)
    assert masks.full() & window == window
    assert masks.empty() | window == window
    assert masks.empty() & window == masks.empty()
    assert masks.full() | window == masks.full()
    assert ~masks.full() == masks.empty()
    assert ~~window == window
    assert window | window == window
    assert masks.full() & masks.full() == masks.full()


def test_bands_join_into_one_exact_band() -> None:
    one_sided = masks.causal() & masks.sliding_window(4)
    assert one_sided == masks.sliding_window(4, causal=True)
    assert one_sided.exact
    assert masks.band(3, 5) & masks.band(6, None) == masks.empty()
    assert masks.sliding_window(4).shift(2) == masks.band(-5, 1)
    assert masks.full().shift(2) == masks.full()


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (masks.causal() & (masks.sliding_window(4) | masks.sinks(2)), "causal() & (sliding_window(4) | sinks(2))"),
        (~(masks.causal() & masks.sinks(2)), "~(causal() & sinks(2))"),
        ((masks.causal() | masks.sinks(2)).shift(3), "(causal() | sinks(2)).shift(3)"),
        (masks.strided(5).shift(3).shift(4), "strided(5).shift(7)"),
        (masks.sliding_window(4, causal=True), "sliding_window(4, causal=True)"),
        (masks.per_head([masks.causal(), masks.full()]), "per_head([causal(), full()])"),
        (masks.windows((4, 6), 2), "windows((4, 6), (2, 2))"),
        (masks.power(4), "power(block=4, window=1, sinks=0, causal=True)"),
    ],
)
def test_masks_print_as_they_are_written(mask: masks.Mask, text: str) -> None:
    assert repr(mask) == text


def test_masks_without_tensors_are_values() -> None:
    def build() -> masks.Mask:
        return masks.causal() & (masks.neighborhood((4, 4), 3) | ~masks.power(2))

    assert build() == build()
    assert hash(build()) == hash(build())
    assert build() != build().shift(1)
    with pytest.raises(AttributeError):
        masks.sinks(3).n = 4  # type: ignore[attr-defined]


def test_heads_and_batch_are_those_of_the_parts() -> None:
    heads = masks.per_head([masks.causal(), masks.full()])
    batch = masks.padding(torch.ones(3, 8, dtype=torch.bool))
    both = ~(heads & batch).shift(0)
    assert (both.heads, both.batch) == (2, 3)
    assert (masks.causal().heads, masks.causal().batch) == (None, None)
    assert both.dense(8).shape == (3, 2, 8, 8)
    assert heads.dense(8).shape == (2, 8, 8)
    assert batch.dense(8).shape == (3, 1, 8, 8)


def test_parts_that_disagree_are_refused() -> None:
    two, three = (masks.per_head([masks.causal()] * count) for count in (2, 3))
    with pytest.raises(ShapeError, match=r"agree on heads.*2 in .*3 in"):
        two & three
    with pytest.raises(ShapeError, match="agree on batch"):
        masks.padding(torch.ones(2, 4).bool()) | masks.padding(torch.ones(3, 4).bool())
    with pytest.raises(ShapeError, match=r"masks\[1\] must not distinguish heads"):
        masks.per_head([masks.causal(), two])
    with pytest.raises(TypeError):
        masks.causal() & True  # type: ignore[operator]


@pytest.mark.parametrize(
    ("mask", "fixed"),
    [
        (masks.documents([4, 8]), "n=12 and m=12"),
        (masks.neighborhood((3, 4), 3), "n=12 and m=12"),
        (masks.from_dense(torch.ones(12, 12).bool()), "12 blocks of 1 along n"),
        (masks.from_blocks(torch.ones(3, 3).bool(), 4), "3 blocks of 4 along n"),
        (masks.groups(torch.zeros(12).long(), torch.ones(1, 1).bool()), "n=12 and m=12"),
        (masks.causal() & ~masks.documents([12]), "n=12 and m=12"),
        (masks.per_head([masks.windows((3, 4), 2)]), "n=12 and m=12"),
    ],
)
def test_masks_of_other_lengths_are_refused(mask: masks.Mask, fixed: str) -> None:
    mask.check(12, 12)
    for used in (
        lambda: mask.check(16, 16),
        lambda: mask.blocks(16),
        lambda: mask.dense(8),
        lambda: mask.density(16),
        lambda: mask.to_flex(8),
        lambda: mask.shift(4).dense(9, 12),
        lambda: mask.shift(-1).dense(8, 12),
    ):
        with pytest.raises(ShapeError, match=fixed):
            used()
    assert mask.shift(4).dense(8, 12).shape[-2:] == (8, 12)  # a view may show a part


def test_padding_fixes_the_keys_only() -> None:
    mask = masks.padding(torch.tensor([True, False, True]))
    assert mask.dense(2, 3).tolist() == [[True, False, True]] * 2
    with pytest.raises(ShapeError, match="made for m=3"):
        mask.dense(2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.sliding_window(0), "window must be an integer of at least 1, got 0"),
        (lambda: masks.sliding_window(2.5), "window must be an integer"),  # type: ignore[arg-type]
        (lambda: masks.sinks(-1), "n must be an integer of at least 0"),
        (lambda: masks.band(3, 2), "least must not exceed most"),
        (lambda: masks.strided(True), "stride must be an integer"),
        (lambda: masks.dilated(2, 0), "dilation"),
        (lambda: masks.power(block=0), "block"),
        (lambda: masks.documents([3, -1]), "lengths"),
        (lambda: masks.documents([]), "ids must be integers"),
        (lambda: masks.documents(), "either lengths or ids"),
        (lambda: masks.documents(ids=torch.tensor([0, 1, 0])), "never decrease"),
        (lambda: masks.documents(ids=torch.ones(3)), "torch.float32"),
        (lambda: masks.groups(torch.tensor([0, 2]), torch.ones(2, 2).bool()), "groups 0 to 1 of allowed, got 0 to 2"),
        (lambda: masks.groups(torch.tensor([0, 1]), torch.ones(2, 2)), "allowed must be bool"),
        (lambda: masks.padding(torch.ones(3)), "valid must be bool"),
        (lambda: masks.from_dense(torch.ones(3, 3)), "mask must be a bool tensor"),
        (lambda: masks.from_dense(torch.ones(3).bool()), "2, 3 or 4 dimensions"),
        (lambda: masks.from_blocks(torch.ones(0, 3).bool()), "must not be empty"),
        (lambda: masks.from_blocks(torch.ones(3, 3).bool(), (1, 2, 3)), "block_size"),  # type: ignore[arg-type]
        (lambda: masks.from_lists(torch.tensor([[0, 5]]), 5), "key block 5, there are 5"),
        (lambda: masks.from_lists(torch.ones(1, 2), 5), "integer tensor"),
        (lambda: masks.random_blocks(16, density=0.0), "density"),
        (lambda: masks.from_function("causal"), "callable"),  # type: ignore[arg-type]
        (lambda: masks.per_head([]), "one mask per head"),
        (lambda: masks.windows(16, 4), "grid must be a sequence"),  # type: ignore[arg-type]
        (lambda: masks.windows((4, 4), (2, 2, 2)), "window must be one value or one per axis"),
        (lambda: masks.shifted_windows((8,), 4, 4), "shift must be smaller than the window"),
        (lambda: masks.halo((8,), 4, -1), "halo"),
        (lambda: masks.neighborhood((8, 8), 3, stride=4), "stride must not exceed the window"),
        (lambda: masks.neighborhood((8, 8), (3, 5), dilation=(1, 2)), r"5 \* 2 on axis 1 of length 8"),
        (lambda: masks.neighborhood((8,), 3, causal=1), "causal must be True or False"),  # type: ignore[arg-type]
        (lambda: masks.product((4, 4), [masks.full()]), "one mask per axis"),
        (lambda: masks.product((4,), [masks.documents([3])]), "made for n=3"),
        (lambda: masks.product((4,), [masks.per_head([masks.full()] * 2)]), "must not distinguish heads"),
        (lambda: masks.causal().blocks(0), "n must be at least 1"),
        (lambda: masks.causal().dense(4, 0), "m must be at least 1"),
        (lambda: masks.causal().blocks(8, block_size=0), "block_size"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ArgumentError, ShapeError), match=message):
        make()


def test_decoding_sees_what_the_last_rows_see() -> None:
    mask = masks.causal() & (masks.sliding_window(4) | masks.sinks(2))
    whole = mask.dense(12)
    for n in (1, 3, 12):
        assert torch.equal(mask.shift(12 - n).dense(n, 12), whole[12 - n :])


def test_to_moves_every_tensor() -> None:
    mask = ~masks.per_head([masks.documents([3, 5]), masks.padding(torch.ones(8).bool()).shift(0)])
    moved = mask.to("meta")
    assert moved.dense(8, device="meta").device.type == "meta"
    assert mask.dense(8).device.type == "cpu"
