"""Aggregated attention and ConvGLU against their definitions, written with loops."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import ArgumentError, ShapeError
from regard.layers.conv_glu import ConvGLU
from regard.mechanisms.grid.aggregated import AggregatedAttention, CosineAttention
from tests.parity.harness import Golden

GOLDEN = Path(__file__).parents[1] / "parity/golden/transnext-aggregated-attention.safetensors"


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module.double().eval()


def cells(length: int, count: int) -> list[range]:
    return [range(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def position(layer: CosineAttention, distances: list[float]) -> Tensor:
    scaled = [d / (side - 1) * 8 for d, side in zip(distances, layer.pretrain_grid, strict=True)]
    signed = [math.copysign(math.log2(abs(d) + 1) / 3, d) for d in scaled]
    hidden = layer.cpb[0].weight @ torch.tensor(signed, dtype=torch.float64) + layer.cpb[0].bias
    return layer.cpb[2].weight @ hidden.clamp(min=0) + layer.cpb[2].bias


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def aggregated(layer: AggregatedAttention, image: Tensor, pool: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(H, W, C) and the number of keys of each token, from the equations, one token and one head after the other."""
    height, width, _ = image.shape
    heads, d, radius = layer.num_heads, layer.head_dim, layer.window_size // 2
    q = unit(layer.q(image).unflatten(-1, (heads, d)))
    k, v = layer.kv(image).unflatten(-1, (2, heads, d)).unbind(-3)
    k = unit(k)
    features = torch.nn.functional.gelu(layer.sr(image))
    places, pooled = [], []
    for rows in cells(height, pool[0]):
        for columns in cells(width, pool[1]):
            places.append((sum(rows) / len(rows), sum(columns) / len(columns)))
            pooled.append(features[rows.start : rows.stop, columns.start : columns.stop].mean((0, 1)))
    kp, vp = layer.kv(layer.norm(torch.stack(pooled))).unflatten(-1, (2, heads, d)).unbind(-3)
    kp = unit(kp)
    out, counts = torch.zeros_like(image), torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            near = [
                (o, y + o // layer.window_size - radius, x + o % layer.window_size - radius)
                for o in range(layer.window_size**2)
            ]
            near = [(o, r, c) for o, r, c in near if 0 <= r < height and 0 <= c < width]
            counts[y, x] = len(near) + len(pooled)
            bias = [position(layer, [y - r, x - c]) for r, c in places]
            for h in range(heads):
                tau = math.log1p(math.exp(layer.temperature[h].item()))
                query = (q[y, x, h] + layer.query_embedding[h, 0]) * tau * math.log(counts[y, x])
                scores = [query @ k[r, c, h] + layer.relative_pos_bias_local[h, o] for o, r, c in near]
                scores += [query @ kp[p, h] + bias[p][h] for p in range(len(pooled))]
                weights = torch.stack(scores).softmax(0)
                total = sum(weights[len(near) + p] * vp[p, h] for p in range(len(pooled)))
                for n, (o, r, c) in enumerate(near):
                    learned = q[y, x, h] @ layer.learnable_tokens[h, :, o] + layer.learnable_bias[h, 0, o]
                    total = total + (weights[n] + learned) * v[r, c, h]
                out[y, x, h * d : (h + 1) * d] = total
    return layer.proj(out), counts


@pytest.mark.parametrize(
    ("grid", "window", "sr_ratio", "pool_size", "pool"),
    [
        ((4, 6), 3, 2, None, (2, 3)),
        ((5, 3), 3, 2, None, (2, 1)),
        ((5, 4), 3, 8, 3, (3, 3)),
        ((1, 2), 5, 1, None, (1, 2)),
    ],
)
def test_it_is_its_definition(
    grid: tuple[int, int], window: int, sr_ratio: int, pool_size: int | None, pool: tuple[int, int]
) -> None:
    layer = randomised(AggregatedAttention(4, 2, (7, 5), window, sr_ratio, pool_size))
    x = torch.randn(2, *grid, 4, dtype=torch.float64)
    got = layer(x)
    for image, y in zip(x, got, strict=True):
        torch.testing.assert_close(y, aggregated(layer, image, pool)[0], atol=1e-6, rtol=1e-6)  # float32 distances


def test_weights_sum_to_one() -> None:
    layer = randomised(AggregatedAttention(4, 2, 4, sr_ratio=2))
    with torch.no_grad():
        layer.learnable_tokens.zero_()
        layer.learnable_bias.zero_()
        layer.kv.weight[4:].zero_()  # all values are the bias, near and far
        want = layer.proj(layer.kv.bias[4:])
    y = layer(torch.randn(1, 4, 5, 4, dtype=torch.float64))
    torch.testing.assert_close(y, want.expand_as(y))


def test_a_token_sees_the_whole_image() -> None:
    layer = randomised(AggregatedAttention(4, 2, 8, sr_ratio=4))
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 4, 4].sum(), x)
    assert gradient.abs().amax(-1).all()


@pytest.mark.parametrize("kind", [AggregatedAttention, CosineAttention])
def test_gradients(kind: type[CosineAttention]) -> None:
    config = {"sr_ratio": 2} if kind is AggregatedAttention else {}
    layer = randomised(kind(2, 1, 3, **config))
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_published_gradients() -> None:
    golden = Golden.read(GOLDEN)
    layer = regard.from_official("transnext", golden.state(), variant="attention", **golden.kwargs).double()
    x = golden.inputs["x"].double().requires_grad_()
    y = layer(x.unflatten(1, (int(golden.inputs["H"]), int(golden.inputs["W"]))))
    want = golden.outputs["grad/in/x"].double()
    (got,) = torch.autograd.grad(y.sum(), x)
    assert (got - want).abs().max() < 1e-6 * want.abs().max()  # published in float32


def test_global_attention_is_its_definition() -> None:
    layer = randomised(CosineAttention(4, 2, (3, 4)))
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    places = [(r, c) for r in range(2) for c in range(3)]
    q, k, v = layer.qkv(x).view(6, 3, 2, 2).unbind(1)
    out = torch.zeros(6, 2, 2, dtype=torch.float64)
    for i, (r, c) in enumerate(places):
        bias = torch.stack([position(layer, [r - s, c - d]) for s, d in places])
        for h in range(2):
            tau = layer.temperature[h, 0, 0].exp().log1p() * math.log(6)
            scores = unit(k[:, h]) @ ((unit(q[i, h]) + layer.query_embedding[h, 0]) * tau) + bias[:, h]
            out[i, h] = scores.softmax(0) @ v[:, h]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(1)).view_as(x), atol=1e-6, rtol=1e-6)


def test_the_gate_sees_neighbours() -> None:
    layer = randomised(ConvGLU(3, 6, 5))
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    u, v = layer.fc1(x[0]).chunk(2, -1)
    assert u.shape[-1] == 4
    gate = layer.dwconv.bias.expand_as(u).clone()
    for y in range(3):
        for z in range(2):
            for dy in (-1, 0, 1):
                for dz in (-1, 0, 1):
                    if 0 <= y + dy < 3 and 0 <= z + dz < 2:
                        gate[y, z] += layer.dwconv.weight[:, 0, dy + 1, dz + 1] * u[y + dy, z + dz]
    normal = (1 + torch.erf(gate / math.sqrt(2))) / 2
    torch.testing.assert_close(layer(x)[0], layer.fc2(gate * normal * v))


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="pretrain_grid"):
        CosineAttention(8, 2, 1)
    with pytest.raises(ArgumentError, match="window_size"):
        AggregatedAttention(8, 2, 4, window_size=4)
    with pytest.raises(ArgumentError, match="num_heads"):
        AggregatedAttention(8, 3, 4)
    with pytest.raises(ArgumentError, match="sr_ratio"):
        AggregatedAttention(8, 2, 4, sr_ratio=0)
    with pytest.raises(ArgumentError, match="hidden_dim"):
        ConvGLU(8, 1)
    with pytest.raises(ShapeError, match="sr_ratio 4"):
        AggregatedAttention(8, 2, 4, sr_ratio=4)(torch.randn(1, 3, 8, 8))
    with pytest.raises(ShapeError, match="pool_size 3"):
        AggregatedAttention(8, 2, 4, pool_size=3)(torch.randn(1, 3, 8, 8))
    with pytest.raises(ShapeError, match="x: expected"):
        AggregatedAttention(8, 2, 4)(torch.randn(1, 8, 8, 4))
