"""Occlusion saliency against loops, masks and segments, and what a hand-made model must show."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError, ShapeError
from regard.probes import (
    frame_masks,
    grid_segments,
    hide,
    kl_scorer,
    occlusion_saliency,
    slic_masks,
    slic_segments,
    standardise_token_maps,
)


def probabilities(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_saliency_is_its_definition() -> None:
    original, perturbed = probabilities(3, 5), probabilities(9, 3, 5, seed=1)
    masks = frame_masks(4 * 2, 9, 0.4, torch.Generator().manual_seed(2)).view(9, 4, 2)
    masks[:, 3, 1] = False  # never hidden
    answers = iter(perturbed.split(4))
    done = []
    got = occlusion_saliency(lambda *_: next(answers), masks, original=original, batch_size=4, on_progress=done.append)
    want = torch.zeros(3, 4, 2, dtype=torch.float64)
    for i in range(3):
        for t in range(4):
            for f in range(2):
                hits = [m for m in range(9) if masks[m, t, f]]
                for m in hits:
                    p, q = original[i].tolist(), perturbed[m, i].tolist()
                    kl = sum(a * (math.log(a + 1e-12) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True))
                    want[i, t, f] += kl / len(hits)
    torch.testing.assert_close(got, want)
    assert got[:, 3, 1].eq(0).all()
    assert done == [4, 8, 9]


def test_batches_and_the_original_come_by_themselves() -> None:
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def answer(masks, targets):
        assert targets is not None
        return (hide(x, masks) @ weights).softmax(-1)[:, None].expand(-1, len(targets), -1)

    masks = frame_masks(6, 40, generator=torch.Generator().manual_seed(3))
    whole = occlusion_saliency(answer, masks, torch.tensor([0, 1]))
    pieces = occlusion_saliency(answer, (part for part in masks.split(7)), torch.tensor([0, 1]))
    torch.testing.assert_close(whole, pieces)
    torch.testing.assert_close(whole[0], whole[1])


def test_what_a_token_is_made_of_is_what_stands_out() -> None:
    """Token i reads frame 2 i alone."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def answer(masks, targets):
        return (3 * hide(x, masks)[:, 0::2]).softmax(-1)

    found = occlusion_saliency(answer, frame_masks(8, 2000, generator=torch.Generator().manual_seed(1)))
    assert found.argmax(1).tolist() == [0, 2, 4, 6]
    assert (found.amax(1) > 1.5 * found.mean(1)).all()


@given(st.integers(0, 1000), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_kl_is_none_for_the_same_and_positive_otherwise(seed, size) -> None:
    p, q = probabilities(4, size, seed=seed), probabilities(4, size, seed=seed + 1)
    torch.testing.assert_close(kl_scorer(p, p), torch.zeros(4, dtype=torch.float64))
    assert (kl_scorer(p, q) > 0).all()
    sure = torch.eye(size, dtype=torch.float64)[:2]
    assert kl_scorer(sure, sure.flip(0)).isfinite().all()  # where the reference has NaN


def test_standardised_maps() -> None:
    maps = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 2
    maps[2] = 1.5
    found = standardise_token_maps(maps)
    for i in (0, 1, 3):
        values = maps[i].flatten().tolist()
        mean = sum(values) / 15
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / 14)
        torch.testing.assert_close(found[i], (maps[i] - mean) / std)
    assert found[2].eq(0).all()

    before = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = standardise_token_maps(before, causal=True)
    assert found[0].eq(0).all()  # one place has no deviation
    for i in range(1, 5):
        torch.testing.assert_close(found[i, : i + 1], standardise_token_maps(before[i : i + 1, : i + 1])[0])
        assert found[i, i + 1 :].eq(0).all()


def test_segments_and_masks() -> None:
    labels = grid_segments(12, 8, 24)
    assert labels.unique().tolist() == list(range(24))
    assert labels.flatten().bincount().tolist() == [4] * 24
    assert grid_segments(5, 3, 1).eq(0).all()
    assert grid_segments(5, 3, 1000).unique().numel() == 15

    spec = torch.zeros(40, 16)
    spec[10:30, 4:12] = 1.0
    superpixels = slic_segments(spec, 20)
    assert superpixels.shape == spec.shape
    assert superpixels.min() == 0
    inside = superpixels[11:29, 5:11].unique().tolist()  # the edge itself is blurred
    assert set(inside).isdisjoint(superpixels[:9].unique().tolist())

    for segments in ("slic", "grid"):
        masks = slic_masks(
            spec, (10, 30), 0.3, 401, torch.Generator().manual_seed(0), segments=segments, full_length=40
        )
        assert masks.shape == (401, 40, 16)
        assert masks.dtype == torch.bool
        assert 0.25 < masks.double().mean() < 0.35
    coarse, fine = masks[:201].double(), masks[201:].double()
    assert (fine.diff(dim=1).abs().mean(0) > 0).sum() > (coarse.diff(dim=1).abs().mean(0) > 0).sum()
    short = slic_masks(spec, (400,), 0.5, 4, segments="grid")  # 40 of 750 frames: 21 segments
    assert len({tuple(column) for column in short.flatten(1).T.tolist()}) <= 21


def test_hiding() -> None:
    x = torch.arange(12.0).view(4, 3)
    masks = torch.tensor([[True, False, False, True]])
    assert hide(x, masks, -1.0)[0, :, 0].tolist() == [-1, 3, 6, -1]
    assert hide(x, torch.ones(2, 4, 3), 5.0).eq(5).all()


def test_refusals() -> None:
    answer = lambda masks, targets: probabilities(len(masks), 2, 3)  # noqa: E731
    with pytest.raises(ArgumentError, match="masks: expected at least one"):
        occlusion_saliency(answer, [])
    with pytest.raises(ArgumentError, match="batch_size"):
        occlusion_saliency(answer, torch.ones(2, 3), batch_size=0)
    with pytest.raises(ShapeError, match="prob_fn: expected"):
        occlusion_saliency(lambda m, t: probabilities(1, 2, 3), torch.ones(2, 3))
    with pytest.raises(ShapeError, match="causal maps"):
        standardise_token_maps(torch.zeros(3, 4), causal=True)
    with pytest.raises(ShapeError, match="masks: expected"):
        hide(torch.zeros(4, 3), torch.zeros(2, 5))
    with pytest.raises(ShapeError, match="spec: expected"):
        slic_masks(torch.zeros(3))
    spec = torch.zeros(8, 4)
    for arguments, message in (
        ({"p": 1.0}, "p: expected"),
        ({"n_masks": 0}, "n_masks"),
        ({"n_segments": ()}, "n_segments"),
        ({"segments": "circles"}, "segments: expected"),
    ):
        with pytest.raises(ArgumentError, match=message):
            slic_masks(spec, **arguments)
