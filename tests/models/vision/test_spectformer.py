"""SpectFormer: spectral gating is a circular convolution; both backbones' pieces, sizes and costs."""

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.spectral import SpectralGating
from regard.models.vision.spectformer import SpectralBlock
from regard.models.vision.spectformer_h import ClassBlock, TokenLabels, paste, random_box
from tests.models.vision.counts import gigamacs, millions

GRIDS = [(4, 6), (5, 3), (3, 4), (2, 5), (1, 1), (1, 4), (6, 1)]


def gating(dim: int, grid: tuple[int, int]) -> SpectralGating:
    torch.manual_seed(0)
    layer = SpectralGating(dim, grid).double()
    torch.nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_a_circular_convolution(grid: tuple[int, int]) -> None:
    layer = gating(3, grid)
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    kernel = torch.fft.irfft2(torch.view_as_complex(layer.weight), s=grid, dim=(0, 1), norm="backward")
    want = torch.zeros_like(x)
    for y in range(grid[0]):
        for z in range(grid[1]):
            want += kernel[y, z] * x.roll((y, z), (1, 2))
    torch.testing.assert_close(layer(x), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.kernel(), kernel)


@pytest.mark.parametrize("grid", GRIDS)
def test_ones_are_the_identity_and_shifts_commute(grid: tuple[int, int]) -> None:
    layer = gating(2, grid)
    x = torch.randn(1, *grid, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x.roll((1, 2), (1, 2))), layer(x).roll((1, 2), (1, 2)))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(layer(x), x)


def test_gradients() -> None:
    layer = gating(2, (3, 4))
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(layer, {"weight": w}, x), (x, layer.weight))


def test_filters_are_interpolated() -> None:
    layer = gating(2, (3, 4))
    before = layer.weight.clone()
    assert layer.resize((5, 8)).weight.shape == (5, 5, 2, 2)
    torch.testing.assert_close(layer.weight[::2, ::2], before)  # every second frequency is an old one
    torch.testing.assert_close(layer.weight[1::2, ::2], (before[1:] + before[:-1]) / 2)
    assert layer(torch.randn(1, 5, 8, 2, dtype=torch.float64)).shape == (1, 5, 8, 2)


def test_a_spectral_block_has_one_residual() -> None:
    torch.manual_seed(0)
    block = SpectralBlock(4, (3, 5), 2, 0.0)
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(block(x) - x, block.mlp(block.norm2(block.mixer(block.norm1(x)))))


def test_the_class_token_alone_attends() -> None:
    torch.manual_seed(0)
    block = ClassBlock(4, 2, 2, 1e-6).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    mean = x[0].mean(0)
    seen = block.norm1(torch.cat([mean[None], x[0]]))
    q, k, v = block.attn.q_proj(seen[0]), block.attn.k_proj(seen), block.attn.v_proj(seen)
    heads = []
    for h in (slice(0, 2), slice(2, 4)):
        heads.append((k[:, h] @ q[h] / 2**0.5).softmax(0) @ v[:, h])
    want = mean + block.attn.o_proj(torch.cat(heads))
    want = want + block.mlp(block.norm2(want))
    torch.testing.assert_close(block(x)[0, 0], want)


@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [
        ("spectformer-xs", {}, 20_028_520),
        ("spectformer-s", {}, 32_449_768),
        ("spectformer-h-s", {}, 22_226_928),
        ("spectformer-h-b", {}, 33_052_880),
        ("spectformer-h-l", {}, 54_675_792),
        ("spectformer-h-s", {"token_label": False}, 21_777_928),
        ("spectformer-h-b", {"token_label": False}, 32_539_880),
        ("spectformer-h-l", {"token_label": False}, 54_162_792),
    ],
)
def test_published_sizes(name: str, config: dict[str, bool], parameters: int) -> None:
    assert millions(name, **config) * 1e6 == pytest.approx(parameters, abs=0.5)


@pytest.mark.parametrize(
    ("name", "published"),
    [("spectformer-t", 1.8), ("spectformer-xs", 4.0), ("spectformer-s", 6.6)],
)
def test_published_costs(name: str, published: float) -> None:
    assert gigamacs(name) == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize(
    ("name", "published", "dims", "depths"),
    [
        ("spectformer-h-s", 3.9, (320, 448), (6, 3)),
        ("spectformer-h-b", 6.3, (320, 512), (12, 3)),
        ("spectformer-h-l", 12.7, (384, 512), (18, 3)),
    ],
)
def test_published_costs_leave_out_the_products_of_attention(
    name: str, published: float, dims: tuple[int, int], depths: tuple[int, int]
) -> None:
    products = sum(2 * n**2 * c * depth for n, c, depth in zip((14**2, 7**2), dims, depths, strict=True))
    assert gigamacs(name) - products / 1e9 == pytest.approx(published, abs=0.05)


H = {"num_classes": 3, "dims": (8, 12), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2), "img_size": 32}


def test_token_labels_in_evaluation() -> None:
    torch.manual_seed(0)
    model = regard.create("spectformer/h", **H, token_label=True).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)[-1].flatten(1, 2)
    token, tokens = model.norms[-1](model.class_block(tokens))[:, 0], model.norms[-1](tokens)
    torch.testing.assert_close(model(images), model.head(token) + 0.5 * model.aux_head(tokens).max(1).values)


def test_token_labels_in_training() -> None:
    torch.manual_seed(0)
    model = regard.create("spectformer/h", **H, token_label=True).train()
    images = torch.randn(4, 3, 32, 32)
    got = model(images)
    assert isinstance(got, TokenLabels)
    assert got.logits.shape == (4, 3)
    assert got.tokens.shape == (4, 16, 3)
    sum(t.square().sum() for t in got[:2]).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    same = images[:1].expand(4, -1, -1, -1)  # whose mirrored batch is itself
    tokens = model.norms[-1](model.forward_features(same)[-1])
    torch.testing.assert_close(model(same).tokens, model.aux_head(tokens).flatten(1, 2))


def test_boxes_are_mixed_in_the_first_stage() -> None:
    torch.manual_seed(0)
    model = regard.create("spectformer/h", **H | {"depths": (0, 0)}).eval()
    model.downsamples[1] = torch.nn.AvgPool2d(1)
    model.norms[0] = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    plain, mixed = (model.forward_features(images, box)[0] for box in (None, torch.tensor([1, 0, 3, 2])))
    want = plain.clone()
    want[:, 2:6, :4] = plain.flip(0)[:, 2:6, :4]
    torch.testing.assert_close(mixed, want)


def test_boxes() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2)
    box = torch.tensor([1, 0, 3, 2])
    assert paste(x, box)[0, 1:3, :2].equal(x[2, 1:3, :2])
    assert paste(paste(x, box), box).equal(x)
    boxes = torch.stack([random_box(8, 6) for _ in range(2000)])
    top, left, bottom, right = boxes.T
    assert (top >= 0).all()
    assert (bottom <= 8).all()
    assert (right <= 6).all()
    assert ((bottom >= top) & (right >= left)).all()
    centre = (bottom - top == 0).logical_not() & (top > 0) & (bottom < 8)
    assert ((bottom - top)[centre] % 2 == 0).all()  # twice half a side, where nothing was cut
    area = ((bottom - top) * (right - left) / 48).mean()
    assert 0.15 < area < 0.35  # half of the images' area, less what is cut and rounded


@pytest.mark.parametrize("name", ["spectformer", "spectformer/h"])
def test_a_resized_model(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    config = {"img_size": 32, "num_classes": 3}
    config |= H if name == "spectformer/h" else {"patch_size": 8, "dim": 8, "depth": 3, "alpha": 2, "num_heads": 2}
    model = regard.create(name, **config).eval()
    images = torch.randn(1, 3, 48, 80)
    with pytest.raises(ShapeError, match="images: expected 32 x 32"):
        model(images)
    got = model.resize((48, 80))(images)
    assert got.shape == (1, 3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(images), got)


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError, match="resize"):
        SpectralGating(4, 3)(torch.randn(1, 3, 4, 4))
    with pytest.raises(ArgumentError, match="grid_size"):
        SpectralGating(4, (3, 0))
    with pytest.raises(ArgumentError, match="grid_size"):
        SpectralGating(4, (3, 3, 3))
    with pytest.raises(ArgumentError, match="grid_size"):
        SpectralGating.from_official({}, dim=4, h=6, w=3)
    with pytest.raises(ArgumentError, match="alpha"):
        regard.create("spectformer", depth=3, alpha=4)
    with pytest.raises(ArgumentError, match="patch_size"):
        regard.create("spectformer", img_size=8)
    with pytest.raises(ArgumentError, match="img_size"):
        regard.create("spectformer", img_size=0)
    with pytest.raises(Unsupported, match="drop_rate"):
        regard.from_official("spectformer", {}, drop_rate=0.1)
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("spectformer/h", depths=(1, 1))
    with pytest.raises(ArgumentError, match="spectral_stages"):
        regard.create("spectformer/h", spectral_stages=5)
