"""The plain baselines against their definition."""

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.models.vision.plain import Plain


def _small(mixer: str, **config) -> Plain:
    torch.manual_seed(0)
    model = Plain(3, 2, 16, 4, dim=8, depth=2, mixer=mixer, num_heads=2, kernel_size=3, **config)  # type: ignore[arg-type]
    return model.double().eval()


def _oracle(model: Plain, images: torch.Tensor) -> torch.Tensor:
    """Patches one by one, attention and filters from their sums."""
    weight, bias = model.stem.weight, model.stem.bias
    rows, columns = images.shape[2] // 4, images.shape[3] // 4
    x = torch.zeros(images.shape[0], rows, columns, 8, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            patch = images[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            x[:, i, j] = torch.einsum("bchw,ochw->bo", patch, weight) + bias
    if model.position is not None:
        x = x + model.position[0].permute(1, 2, 0)
    for block in model.stages[0]:
        y = block.norm1(x)
        if model.position is not None:
            tokens = y.reshape(-1, rows * columns, 8)
            m, heads = block.mixer, []
            q, k, v = (f(tokens) for f in (m.q_proj, m.k_proj, m.v_proj))
            for part in (slice(0, 4), slice(4, 8)):
                weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
                heads.append(weights @ v[..., part])
            y = m.o_proj(torch.cat(heads, -1)).reshape(x.shape)
        else:
            padded = F.pad(y, (0, 0, 1, 1, 1, 1))
            y = block.mixer.bias.expand(x.shape).clone()
            for i in range(3):
                for j in range(3):
                    y = y + padded[:, i : i + rows, j : j + columns] * block.mixer.weight[:, 0, i, j]
        x = x + y
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.head(model.norm(x).mean((1, 2)))


@pytest.mark.parametrize("mixer", ["attention", "conv"])
def test_it_is_what_it_says(mixer):
    model = _small(mixer)
    images = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), _oracle(model, images))


@pytest.mark.parametrize("mixer", ["attention", "conv"])
def test_other_sizes_features_and_training(mixer):
    images = torch.randn(2, 2, 24, 8, dtype=torch.float64)
    model = _small(mixer, features_only=True)
    (feature,) = model(images)
    assert feature.shape == (2, *model.channels, 6, 2)
    assert model.strides == (4,)
    assert _small(mixer, drop_path_rate=0.5)(images).shape == (2, 3)
    trained = _small(mixer).train()
    trained(images).square().sum().backward()
    assert all(p.grad is not None for p in trained.parameters())
    with pytest.raises(ShapeError, match="multiples of the patch"):
        model(torch.randn(1, 2, 18, 16, dtype=torch.float64))


def test_positions_follow_the_size_of_the_image():
    model = _small("attention")
    assert model.position is not None
    model.position.data.fill_(3.0)  # the same everywhere, so at every size
    flat = Plain(3, 2, 24, 4, dim=8, depth=2, num_heads=2).double().eval()
    state = {k: v for k, v in model.state_dict().items() if k != "position"}
    flat.load_state_dict(state | {"position": torch.full((1, 8, 6, 6), 3.0)})
    images = torch.randn(1, 2, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(model(images), flat(images))


def test_parameters_of_the_published_transformer():
    with torch.device("meta"):
        model = Plain(**Plain.sizes["vit-tiny"])
    # DeiT-Ti has 5,717,416, of which 384 are its class token and that token's position
    assert sum(p.numel() for p in model.parameters()) == 5_717_416 - 384


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="mixer"):
        Plain(mixer="mean")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="patch_size"):
        Plain(img_size=8, patch_size=16)
