"""Texture synthesis: Gram matrices forget position, and what is synthesised has those of its original."""

import pytest
import torch
from torch import nn

from regard.errors import ArgumentError, ShapeError
from regard.tasks.shapes import SHAPES, shape_pictures
from regard.tasks.texture import RandomFilters, gram, gram_loss, grams, texture_synthesis


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gram_equals_loops_and_forgets_position() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=seeded())
    found = gram(x)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                total = sum(float(x[b, i, r, c] * x[b, j, r, c]) for r in range(4) for c in range(5))
                assert found[b, i, j].item() == pytest.approx(total / 60)
    moved = x.flatten(2)[:, :, torch.randperm(20, generator=seeded(1))].unflatten(2, (4, 5))
    torch.testing.assert_close(gram(moved), found, atol=1e-6, rtol=0)
    loss = gram_loss([found, found], [found + 2, found + 1], [1.0, 3.0])
    torch.testing.assert_close(loss, torch.full((2,), 9 * 4 + 3 * 9 * 1.0, dtype=torch.float64))


def test_random_filters_are_what_they_say() -> None:
    filters = RandomFilters(2, 5, (3, 7), seed=4)
    x = torch.rand(2, 2, 12, 12, generator=seeded())
    assert filters.layers == ("pixels", "filters.0", "filters.1")
    for name, out in zip(filters.layers, filters(x), strict=True):
        assert out.shape == (2, 3 if name == "pixels" else 5, 12, 12)
    weight = filters.filters[1].weight
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(5))
    assert weight.mean((2, 3)).abs().max() < 1e-6
    assert torch.equal(RandomFilters(2, 5, (3, 7), seed=4).filters[1].weight, weight)
    first, second = grams(x, filters, ["pixels"])[0]
    flat = torch.cat([x[0].flatten(1), torch.ones(1, 144)])
    torch.testing.assert_close(first, flat @ flat.T / (3 * 144))
    assert not torch.allclose(first, second)


def test_a_synthesis_has_the_statistics_and_not_the_arrangement() -> None:
    pictures = shape_pictures(2, 16, generator=seeded(3)).images
    filters = RandomFilters(1, 8, (3, 5))
    seen = []
    found = texture_synthesis(pictures, filters, filters.layers, 60, 1, on_progress=lambda *at: seen.append(at))
    assert seen == [(50, 60), (60, 60)]
    wanted = grams(pictures, filters, filters.layers)
    torch.testing.assert_close(found.loss, gram_loss(grams(found.images, filters, filters.layers), wanted))
    unrelated = gram_loss(wanted, [g.flip(0) for g in wanted])
    assert (found.loss < 0.01 * unrelated).all()
    assert (found.images >= 0).all()
    assert (found.images <= 1).all()
    for a, b in zip(pictures, found.images, strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] < 0.5
    one = texture_synthesis(pictures[0], filters, filters.layers, 20, 1)
    assert (one.images.shape, one.loss.shape) == ((1, 16, 16), ())
    assert torch.equal(one.images, texture_synthesis(pictures[0], filters, filters.layers, 20, 1).images)
    assert not torch.equal(one.images, texture_synthesis(pictures[0], filters, filters.layers, 20, 2).images)


def test_any_network_with_named_layers_will_do_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2))
    before = [p.clone() for p in net.parameters()]
    picture = torch.rand(3, 10, 10, generator=seeded())
    rough, fine = (texture_synthesis(picture, net, ["0", "2"], steps, 1).loss for steps in (1, 30))
    assert fine < 0.1 * rough
    weighted = texture_synthesis(picture, net, ["0", "2"], 30, 1, weights=[1.0, 1000.0]).images
    plain = texture_synthesis(picture, net, ["0", "2"], 30, 1).images
    second = [gram_loss(grams(x[None], net, ["2"]), grams(picture[None], net, ["2"])) for x in (weighted, plain)]
    assert second[0] < second[1]
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_shapes_are_where_their_masks_are() -> None:
    images, classes, masks = shape_pictures(64, 24, noise=0.0, generator=seeded())
    assert (images.shape, classes.shape, masks.shape) == ((64, 1, 24, 24), (64,), (64, 24, 24))
    assert set(classes.tolist()) == set(range(len(SHAPES)))
    for image, mask in zip(images[:, 0], masks, strict=True):
        assert 0.01 < mask.float().mean() < 0.4
        assert abs(image[mask].median() - image[~mask].median()) > 0.09  # a ground beyond black or white is cut off
        assert torch.equal(mask[0], torch.zeros(24, dtype=torch.bool))  # a shape keeps inside the picture
    disc, ring = (masks[classes == list(SHAPES).index(name)][0] for name in ("disc", "ring"))
    middle = [m.nonzero().float().mean(0).round().long() for m in (disc, ring)]
    assert disc[tuple(middle[0])]
    assert not ring[tuple(middle[1])]
    assert torch.equal(shape_pictures(3, generator=seeded(2)).images, shape_pictures(3, generator=seeded(2)).images)


def test_refusals() -> None:
    filters = RandomFilters(1, 2, (3,))
    picture = torch.rand(1, 8, 8)
    with pytest.raises(ShapeError, match=r"features: expected \(B, C, H, W\)"):
        gram(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match="image: expected"):
        texture_synthesis(picture[0], filters, filters.layers)
    with pytest.raises(ArgumentError, match=r"image: expected pixels in \[0, 1\]"):
        texture_synthesis(picture + 1, filters, filters.layers)
    with pytest.raises(ArgumentError, match="steps: expected at least 1, got 0"):
        texture_synthesis(picture, filters, filters.layers, 0)
    with pytest.raises(ArgumentError, match="weights: expected 2 numbers above 0"):
        texture_synthesis(picture, filters, filters.layers, weights=[1.0])
    with pytest.raises(ArgumentError, match=r"no module \['relu1'\]; it has: pixels, filters"):
        texture_synthesis(picture, filters, ["relu1"])
    with pytest.raises(ArgumentError, match="channels and filters"):
        RandomFilters(0)
    with pytest.raises(ArgumentError, match="sizes: expected odd numbers from 3"):
        RandomFilters(1, 2, (4,))
    with pytest.raises(ArgumentError, match="count, size and noise"):
        shape_pictures(0)
