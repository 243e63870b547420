"""L2ViT: the linear attention against its quadratic form; the backbone's pieces and sizes."""

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers.grid import DropPath, drop_path_rates, unwindows, windows
from regard.mechanisms.grid.window import WindowAttention2d
from regard.mechanisms.linear.relu_linear import ReLULinearAttention


@pytest.mark.parametrize("least", [0.5, 100.0])
def test_it_is_its_quadratic_form(least: float) -> None:
    torch.manual_seed(0)
    layer = ReLULinearAttention(8, 2, min_denominator=least).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = q.relu() @ k.relu().mT
    out = scores / scores.sum(-1, keepdim=True).clamp(min=least) @ v * layer.temperature
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).flatten(2)))


def test_gradients() -> None:
    torch.manual_seed(0)
    layer = ReLULinearAttention(4, 2, min_denominator=0.1).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_windows_and_back() -> None:
    x = torch.randn(2, 5, 7, 3)
    cut = windows(x, 4)
    assert cut.shape == (2 * 2 * 2, 16, 3)
    torch.testing.assert_close(cut[1, 0], x[0, 0, 4])  # second window of the first row
    assert cut[1].view(4, 4, 3)[:, 3].eq(0).all()
    torch.testing.assert_close(unwindows(cut, 4, 5, 7), x)


def test_window_attention_stays_inside_its_window() -> None:
    torch.manual_seed(0)
    layer = WindowAttention2d(8, 2, 3)
    x = torch.randn(1, 5, 6, 8)
    other = x.clone()
    other[0, 4, 5] += 1
    changed = (layer(x) - layer(other)).abs().amax(-1)[0] > 1e-6
    assert changed[3:, 3:].all()
    assert not changed[:3].any()
    assert not changed[:, :3].any()


@pytest.mark.parametrize(("name", "millions"), [("l2vit-tiny", 28.60), ("l2vit-small", 50.20), ("l2vit-base", 88.58)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = regard.create(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-3)


def test_the_backbone_takes_any_size() -> None:
    torch.manual_seed(0)
    model = regard.create(
        "l2vit/model",
        num_classes=3,
        in_chans=1,
        dims=(8, 16),
        depths=(2, 1),
        num_heads=(1, 2),
        window_size=3,
        drop_path_rate=0.5,
    )
    images = torch.randn(2, 1, 45, 33)
    assert model.eval()(images).shape == (2, 3)
    assert [tuple(f.shape) for f in model.forward_features(images)] == [(2, 12, 9, 8), (2, 6, 5, 16)]


def test_stochastic_depth() -> None:
    torch.manual_seed(0)
    assert drop_path_rates(0.2, (2, 1)) == [[0.0, 0.1], [0.2]]
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 2)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="min_denominator"):
        ReLULinearAttention(8, 2, min_denominator=0)
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("l2vit/model", depths=(1, 1))
    with pytest.raises(ShapeError, match="images"):
        regard.create("l2vit/model", dims=(8,), depths=(1,), num_heads=(1,))(torch.randn(1, 1, 32, 32))
    with pytest.raises(Unsupported, match="block_type"):
        regard.from_official("l2vit", {}, variant="model", block_type="other")
