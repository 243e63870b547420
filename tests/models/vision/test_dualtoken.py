"""DualToken-ViT: its cost, its stages and streams, images of other sizes."""

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError
from regard.models.vision.dualtoken import DualTokenMerge
from tests.models.vision.counts import gigamacs

TINY = {
    "num_classes": 3,
    "embed_dims": (8, 16),
    "depths": (1, 2),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "token_grid": (2, 2),
}


@pytest.mark.parametrize(("name", "published"), [("dualtoken-vit-t", 0.5), ("dualtoken-vit-s", 1.0)])
def test_published_multiply_adds(name: str, published: float) -> None:
    """The paper's cost; the widths and depths are ours, as it gives no sizes that could be had."""
    assert gigamacs(name) == pytest.approx(published, rel=0.03)


def test_the_cost_is_linear_in_the_pixels() -> None:
    costs = [gigamacs("dualtoken-vit-t", size) for size in (448, 896, 1344)]
    assert (costs[2] - costs[0]) / (costs[1] - costs[0]) == pytest.approx((3**2 - 1) / (2**2 - 1), rel=1e-6)


def test_merging_is_its_definition() -> None:
    torch.manual_seed(0)
    merge, x, tokens = DualTokenMerge(4, 6), torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4)
    y, new = merge(x, tokens)
    assert y.shape == (2, 2, 2, 6)
    full = torch.cat([x, torch.zeros(2, 1, 4, 4)], 1)
    for r in range(2):
        for c in range(2):
            four = [full[:, 2 * r + i, 2 * c + j] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
            want = merge.shortcut(torch.stack(four).amax(0)) + merge.reduction(merge.norm(torch.cat(four, -1)))
            torch.testing.assert_close(y[:, r, c], want)
    torch.testing.assert_close(new, merge.token_proj(F.layer_norm(tokens, (4,))))


def test_both_streams_go_through_all_stages() -> None:
    torch.manual_seed(0)
    model, images = regard.create("dualtoken-vit", **TINY).eval(), torch.randn(2, 3, 33, 50)
    x, tokens = model.stem(images.movedim(1, -1)), model.global_tokens.expand(2, -1, -1)
    x, tokens = model.stages[0][0](x, tokens)
    first = x
    x, tokens = model.downsamples[0](x, tokens)
    for block in model.stages[1]:
        x, tokens = block(x, tokens)
    features = model.forward_features(images)
    torch.testing.assert_close(features[0], first)
    torch.testing.assert_close(features[1], x)
    assert [tuple(f.shape) for f in features] == [(2, 5, 7, 8), (2, 3, 4, 16)]
    torch.testing.assert_close(model(images), model.head(F.layer_norm(x, (16,)).flatten(1, 2).mean(1)))
    want = model(images)
    with torch.no_grad():
        model.global_tokens.add_(torch.randn_like(model.global_tokens))
    assert (model(images) - want).abs().max() > 1e-4


def test_options() -> None:
    torch.manual_seed(0)
    block = {"alpha": "channel", "residual": "twice", "queries": "local", "num_downsamples": 0}
    model = regard.create("dualtoken-vit", **TINY, mlp="mix", neck_dim=24, block=block).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert model.num_features == 24
    assert not model.stages[0][0].tokens.downsamples
    assert model.stages[0][0].tokens.alpha.shape == (8,)
    assert [len(b.tokens.downsamples) for s in regard.create("dualtoken-vit-t").stages for b in s] == [2, 1, 1, 0, 0, 0]
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("dualtoken-vit", **{**TINY, "depths": (1,)})
