"""TransNeXt: published sizes and cost, sizes of images, what it refuses."""

import pytest
import torch
from torch import Tensor

import regard
from regard.attention import Partial
from regard.attention.grid_plan import Axis
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid import aggregated
from tests.models.vision.counts import gigamacs, millions

TINY = {"num_classes": 3, "embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (3, 2), "depths": (1, 1)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("transnext-micro", 12_809_304),
        ("transnext-tiny", 28_258_960),
        ("transnext-small", 49_741_564),
        ("transnext-base", 89_721_496),
    ],
)
def test_published_parameters(name: str, parameters: int) -> None:
    assert round(millions(name) * 1e6) == parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [("transnext-micro", 2.7), ("transnext-tiny", 5.7), ("transnext-small", 10.3), ("transnext-base", 18.4)],
)
def test_published_multiply_adds(name: str, published: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are counted per visible pair, three times: scores, weights and the learned sum; tiles compute more."""
    pairs = []

    def dense(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, return_lse: bool = False, **_: object
    ) -> Tensor | Partial:
        scores = q @ k.mT + bias
        out = scores.softmax(-1) @ v
        return Partial(out, scores.logsumexp(-1)) if return_lse else out

    def counted(q: Tensor, k: Tensor, v: Tensor, axes: list[Axis], **_: object) -> Partial:
        pairs.append(3 * q.numel() * axes[0].window * axes[1].window)
        return Partial(v, v[..., 0])

    monkeypatch.setattr(aggregated, "attention", dense)
    monkeypatch.setattr(aggregated, "grid_attention", counted)
    assert gigamacs(name) + sum(pairs) / 1e9 == pytest.approx(published, abs=max(0.05, 0.01 * published))


def test_images_of_other_sizes() -> None:
    torch.manual_seed(0)
    model = regard.create("transnext", **TINY, sr_ratios=(4, 1), features_only=True).eval()
    small, large = model(torch.randn(1, 3, 33, 50))
    assert small.shape == (1, 8, 9, 13)
    assert large.shape == (1, 16, 5, 7)
    with pytest.raises(ShapeError, match="images: expected 4 or more tokens a side in stage 0"):
        model(torch.randn(1, 3, 12, 64))
    pooled = regard.create("transnext", **TINY, sr_ratios=(4, 1), pool_size=4).eval()
    assert pooled(torch.randn(1, 3, 24, 32)).shape == (1, 3)
    with pytest.raises(ShapeError, match="images: expected 5 or more tokens a side in stage 0"):
        pooled(torch.randn(1, 3, 16, 16))


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("transnext", depths=(1, 1))
    with pytest.raises(ArgumentError, match="pretrain_size"):
        regard.create("transnext", pretrain_size=32)
    with pytest.raises(ArgumentError, match="window_size"):
        regard.create("transnext", **TINY, sr_ratios=(4, 2), window_size=(3, None))
