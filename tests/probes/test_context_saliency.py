"""Context-aware saliency against loops over patches; hand cases; and its composition with relevance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from skimage.color import rgb2lab
from torch import nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.probes import context_aware_saliency, lrp, salient_relevance


def lab(picture: torch.Tensor) -> torch.Tensor:
    values = torch.from_numpy(rgb2lab(picture.permute(1, 2, 0).double().numpy())).permute(2, 0, 1)
    scale, zero = torch.tensor([100.0, 255.0, 255.0]), torch.tensor([0.0, 128.0, 128.0])
    return (values + zero[:, None, None]) / scale[:, None, None]


def resized(picture: torch.Tensor, scale: float) -> torch.Tensor:
    size = [max(2, round(scale * side)) for side in picture.shape[1:]]
    return picture if scale == 1 else F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def pieces(picture: torch.Tensor, side: int, step: int) -> list[tuple[np.ndarray, float, float]]:
    """(patch, row, column) with places as shares of the sides, in reading order."""
    _, height, width = picture.shape
    reach, found = side // 2, []
    places = [
        [round((i + 0.5) * length / math.ceil(length / step) - 0.5) for i in range(math.ceil(length / step))]
        for length in (height, width)
    ]
    for row in places[0]:
        for column in places[1]:
            patch = [
                picture[:, min(max(row + i, 0), height - 1), min(max(column + j, 0), width - 1)].numpy()
                for i in range(-reach, reach + 1)
                for j in range(-reach, reach + 1)
            ]
            found.append((np.array(patch), (row + 0.5) / height, (column + 0.5) / width))
    return found


def naive(picture: torch.Tensor, patch: int, k: int, c: float, scales, focus: float, step: int) -> np.ndarray:
    whole = lab(picture)
    _, height, width = whole.shape
    maps = []
    for r in scales:
        own = pieces(resized(whole, r), patch, step)
        others = [pieces(resized(whole, r * part), patch, step) for part in (1, 0.5, 0.25)]
        found = []
        for i, (mine, row, column) in enumerate(own):
            distances = []
            for level, group in enumerate(others):
                for j, (theirs, y, x) in enumerate(group):
                    if (level, j) != (0, i):
                        colour = math.sqrt(((mine - theirs) ** 2).mean())
                        far = math.hypot((row - y) * height, (column - x) * width) / max(height, width)
                        distances.append(colour / (1 + c * far))
            nearest = sorted(distances)[:k]
            found.append(1 - math.exp(-sum(nearest) / len(nearest)))
        grid = [math.ceil((side if r == 1 else max(2, round(r * side))) / step) for side in (height, width)]
        unlike = torch.tensor(found, dtype=torch.float64).view(1, 1, *grid)
        unlike = F.interpolate(unlike, (height, width), mode="bicubic")[0, 0].clamp(0, 1).numpy()
        foci = (unlike - unlike.min()) / (unlike.max() - unlike.min()) > focus
        near = distance_transform_edt(~foci) / max(height, width) if foci.any() else np.zeros_like(unlike)
        maps.append(unlike * (1 - near.clip(max=1)))
    return np.mean(maps, 0)


@pytest.mark.parametrize(("patch", "k", "focus", "step"), [(7, 64, 0.8, 3), (3, 4, 0.5, 2), (5, 9, 1.0, 4)])
def test_equals_the_definition_patch_by_patch(patch, k, focus, step) -> None:
    torch.manual_seed(0)
    picture = torch.rand(3, 22, 17)
    picture[:, 5:12, 6:11] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    scales = (1.0, 0.8, 0.5)
    got = context_aware_saliency(picture, patch, k, 3.0, scales, focus, step=step)
    torch.testing.assert_close(
        got.double(), torch.from_numpy(naive(picture, patch, k, 3.0, scales, focus, step)), atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("shape", [(40, 50), (3, 9, 7), (2, 1, 5, 64), (1, 3, 1, 1)])
def test_a_constant_picture_has_no_saliency(shape) -> None:
    assert not context_aware_saliency(torch.full(shape, 0.3)).any()


def test_a_bright_square_stands_out() -> None:
    square = torch.zeros(64, 64)
    square[30:39, 20:29] = 1
    found = context_aware_saliency(square)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    far = torch.hypot(torch.relu((rows - 34).abs() - 4.0), torch.relu((columns - 24).abs() - 4.0)) > 20
    assert found[square > 0].mean() >= 3 * found[far].mean()
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(context_aware_saliency(5 - 40 * square), found, atol=0.2, rtol=0)  # dark on bright


def test_the_context_brings_the_neighbourhood_of_foci_forward() -> None:
    """Of two alike patterns, the one beside something outstanding loses less."""
    picture = torch.zeros(60, 60)
    picture[4:56, 10] = picture[4:56, 50] = 0.3
    picture[26:34, 14:22] = 1
    without = context_aware_saliency(picture, focus=1.0)
    kept = context_aware_saliency(picture) / without.clamp(min=1e-3)
    assert kept[:, 10].mean() > kept[:, 50].mean() + 0.1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_any_size_stays_between_0_and_1_and_turns_with_the_picture(height, width, seed) -> None:
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    found = context_aware_saliency(picture, k=8)
    assert found.shape == (height, width)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    plain, turned = (context_aware_saliency(one, k=8, focus=1.0) for one in (picture, picture.mT))
    torch.testing.assert_close(turned, plain.mT, atol=1e-4, rtol=0)  # foci may be a matter of rounding


def test_large_pictures_are_shrunk_and_batches_are_pictures_one_by_one() -> None:
    picture = torch.rand(2, 3, 40, 60)
    found = context_aware_saliency(picture, max_side=30)
    assert found.shape == (2, 40, 60)
    torch.testing.assert_close(context_aware_saliency(picture[1], max_side=30), found[1])
    grey = torch.rand(20, 20)
    scaled = (grey - grey.min()) / (grey.max() - grey.min())
    torch.testing.assert_close(
        context_aware_saliency(grey), context_aware_saliency(scaled.expand(3, -1, -1)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_salient_relevance_is_that_of_the_magnitude_of_relevance(channels) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3))
    x = torch.randn(2, channels, 12, 12)
    size = abs(lrp(model, x, 1, "epsilon"))
    low, high = (limit(size, (1, 2, 3), keepdim=True) for limit in (torch.amin, torch.amax))
    want = context_aware_saliency((size - low) / (high - low), k=16)
    torch.testing.assert_close(salient_relevance(model, x, 1, "epsilon", k=16), want)
    assert want.shape == (2, 12, 12)
    with pytest.raises(ShapeError, match="x: expected pictures"):
        salient_relevance(model, x[0])
    with pytest.raises(Unsupported, match="no rule for Tanh"):
        salient_relevance(nn.Sequential(nn.Tanh(), model), x)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"map_or_image": torch.rand(2, 8, 8)}, ShapeError, "map_or_image: expected"),
        ({"map_or_image": torch.rand(8)}, ShapeError, "map_or_image: expected"),
        ({"map_or_image": torch.rand(0, 3, 8, 8)}, ShapeError, "map_or_image: expected"),
        ({"map_or_image": torch.rand(3, 8, 8) * 255}, ArgumentError, "a picture in .0, 1."),
        ({"map_or_image": torch.full((8, 8), torch.nan)}, ArgumentError, "finite"),
        ({"patch": 4}, ArgumentError, "patch: expected a positive odd"),
        ({"k": 0}, ArgumentError, "k: "),
        ({"step": 0}, ArgumentError, "step"),
        ({"max_side": 0}, ArgumentError, "max_side"),
        ({"scales": ()}, ArgumentError, "scales"),
        ({"scales": (1.5,)}, ArgumentError, "scales"),
        ({"focus": 0.0}, ArgumentError, "focus"),
        ({"c": -1.0}, ArgumentError, "c and focus"),
    ],
)
def test_refusals(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        context_aware_saliency(**{"map_or_image": torch.rand(8, 8)} | arguments)
