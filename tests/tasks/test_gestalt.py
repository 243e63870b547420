"""Gestalt stimuli and their scores, against loops and cases by hand."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.probes.gestalt import activation_map, convexity_index, figure_ground_auc, illusory_contour_index
from regard.tasks.gestalt import convexity_stimulus, figure_ground_stimulus, kanizsa_stimulus


def test_kanizsa_pixel_by_pixel() -> None:
    size, radius, side = 64, 6.0, 30.0
    square, turned = (kanizsa_stimulus(size, radius, side, illusory) for illusory in (True, False))
    for row in range(size):
        for column in range(size):
            y, x = row - 31.5, column - 31.5
            cy, cx = (side / 2 if v > 0 else -side / 2 for v in (y, x))
            inside = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
            inwards = abs(x) < side / 2 and abs(y) < side / 2
            outwards = abs(x) > side / 2 and abs(y) > side / 2
            assert square.image[0, row, column] == (0.0 if inside and not inwards else 1.0)
            assert turned.image[0, row, column] == (0.0 if inside and not outwards else 1.0)
    assert torch.equal(square.edge, turned.edge)
    assert torch.equal(square.control, turned.control)


def test_contour_and_controls_are_alike_but_for_the_contour() -> None:
    found = kanizsa_stimulus(120, 10, 50)
    assert found.edge.sum() == found.control.sum() > 100
    assert (found.image[0][found.edge] == 1).all()  # nothing is drawn at either
    assert (found.image[0][found.control] == 1).all()

    def distances(mask: torch.Tensor) -> list[float]:
        """To the nearest disc's middle."""
        at = mask.nonzero() - 59.5
        return sorted((at.abs() - 25).norm(dim=1).tolist())

    assert distances(found.edge) == pytest.approx(distances(found.control))
    for mask in (found.edge, found.control):
        assert torch.equal(mask, mask.T)
        assert torch.equal(mask, mask.flip(0))


def test_contour_index() -> None:
    stimulus = kanizsa_stimulus(64, 6, 30)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = illusory_contour_index(noise, stimulus.edge, stimulus.control)
    assert abs(plain) < 0.3
    values = [noise[tuple(at)].item() for at in stimulus.control.nonzero().tolist()]
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    lifted = illusory_contour_index(noise + 2 * stimulus.edge, stimulus.edge, stimulus.control)
    assert lifted - plain == pytest.approx(2 / spread)
    with pytest.raises(ArgumentError, match="all alike"):
        illusory_contour_index(torch.zeros(64, 64), stimulus.edge, stimulus.control)
    with pytest.raises(ArgumentError, match="expected 1 and 2 positions"):
        illusory_contour_index(noise, torch.zeros_like(stimulus.edge), stimulus.control)
    with pytest.raises(ShapeError, match="edge: expected bool"):
        illusory_contour_index(noise, stimulus.edge[:32], stimulus.control)


@pytest.mark.parametrize("dark", [True, False])
def test_convex_columns_are_wider_where_they_bulge(dark) -> None:
    found = convexity_stimulus(96, 4, dark)
    assert torch.equal(found.convex, ~found.concave)
    assert torch.equal(found.image[0] == 0, found.convex if dark else found.concave)
    widths = found.convex[:, :36].sum(1)  # the first column has a right border alone
    assert widths.max() > widths.min() + 5
    assert 0.35 < found.convex.float().mean() < 0.65
    # convex: the border of an arc lies beyond the straight line between any two of its points
    arc = found.convex[24:48, :36].sum(1).float()
    assert all(arc[i] >= (arc[i - 6] + arc[i + 6]) / 2 - 1 for i in range(6, 18))


def test_convexity_index_counts_pairs() -> None:
    stimuli = [convexity_stimulus(64, n) for n in (3, 4, 5, 6)]
    convex, concave = (torch.stack([getattr(s, name) for s in stimuli]) for name in ("convex", "concave"))
    assert convexity_index(convex.float(), convex, concave) == 1
    assert convexity_index(concave.float(), convex, concave) == 0
    assert convexity_index(torch.ones(4, 64, 64), convex, concave) == 0.5
    mixed = torch.cat([convex[:1], concave[1:2], convex[2:3], torch.zeros_like(convex[:1])]).float()
    assert convexity_index(mixed, convex, concave) == 2.5 / 4
    with pytest.raises(ArgumentError, match="both in every picture"):
        convexity_index(mixed, convex, torch.zeros_like(concave))


def test_figures_differ_from_their_ground_in_direction_alone() -> None:
    found = figure_ground_stimulus(224, torch.Generator().manual_seed(0))
    assert 0.1 < found.mask.float().mean() < 0.5
    assert found.mask[112, 112]
    assert not found.mask[0].any()
    assert abs(found.image[0][found.mask].mean() - found.image[0][~found.mask].mean()) < 0.05
    again = figure_ground_stimulus(224, torch.Generator().manual_seed(1))
    assert not torch.equal(found.mask, again.mask)


def test_auc_equals_counting_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (6, 7), generator=generator)  # with ties
    mask = torch.rand(6, 7, generator=generator) < 0.4
    figure, ground = values[mask].tolist(), values[~mask].tolist()
    wins = sum((f > g) + 0.5 * (f == g) for f in figure for g in ground)
    assert figure_ground_auc(values.float(), mask) == pytest.approx(wins / len(figure) / len(ground))
    assert figure_ground_auc(mask.float(), mask) == 1
    assert figure_ground_auc(torch.zeros(6, 7), mask) == 0.5
    with pytest.raises(ArgumentError, match="expected figure and ground, got 0 and 42 pixels"):
        figure_ground_auc(values.float(), torch.zeros_like(mask))


def test_activation_maps() -> None:
    tokens = torch.zeros(2, 6, 4)
    tokens[0, :, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    tokens[1, :, 2] = torch.tensor([0.0, -8.0, 0.0, 4.0, 0.0, 0.0])
    norm = activation_map(tokens, (2, 3), (4, 6))
    assert norm.shape == (2, 4, 6)
    assert norm[0, ::2, ::2].flatten().tolist() == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 1])
    assert torch.equal(norm[:, ::2, ::2], norm[:, 1::2, 1::2])
    assert norm[1, ::2, ::2].flatten().tolist() == [0, 1, 0, 0.5, 0, 0]
    component = activation_map(tokens, (2, 3), (2, 3), by="component")
    torch.testing.assert_close(component[0], norm[0, ::2, ::2])
    torch.testing.assert_close(component[1].flatten(), torch.tensor([4, 12, 4, 0, 4, 4]) / 12)
    with pytest.raises(ShapeError, match=r"tokens: expected \(B, 8, C\), got \(2, 6, 4\)"):
        activation_map(tokens, (2, 4), 8)
    with pytest.raises(ArgumentError, match="by: expected 'norm' or 'component'"):
        activation_map(tokens, (2, 3), 8, by="mean")


def test_refusals_of_stimuli() -> None:
    with pytest.raises(ArgumentError, match="size, radius and side"):
        kanizsa_stimulus(100, 10, 60)
    with pytest.raises(ArgumentError, match="size, radius and side"):
        kanizsa_stimulus(200, 50, 100)
    with pytest.raises(ArgumentError, match="regions"):
        convexity_stimulus(64, 2)
    with pytest.raises(ArgumentError, match="size: expected at least 16"):
        figure_ground_stimulus(8)
