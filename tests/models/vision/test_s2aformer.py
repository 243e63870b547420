"""S2AFormer: strip attention against two definitions, its monotone rows, the order of a block, costs."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.strip import StripAttention
from regard.models.vision.s2aformer import HybridPerceptionBlock
from tests.models.vision.counts import gigamacs, millions


def layer(*args: int, **config: object) -> StripAttention:
    torch.manual_seed(0)
    made = StripAttention(*args, **config).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def coarse(made: StripAttention, c: torch.Tensor) -> torch.Tensor:
    """One grid (H, W, C) to (M, C), patch by patch."""
    r = made.sr_ratio
    if r == 1:
        return c.flatten(0, 1)
    conv, last, norm = made.reduce
    cells = []
    for y in range(0, c.shape[0], r):
        for x in range(0, c.shape[1], r):
            patch = c[y : y + r, x : x + r]
            if conv.groups == 1:
                cells.append(torch.einsum("oiyx,yxi->o", conv.weight, patch) + conv.bias)
            else:
                cells.append((conv.weight[:, 0].movedim(0, -1) * patch).sum((0, 1)) + conv.bias)
    return norm(last(torch.stack(cells)))


def naive(made: StripAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """One image with one number per head."""
    z, tokens = coarse(made, context), x.flatten(0, 1)
    q, k, v = made.q_proj(tokens), made.k_proj(z), made.v_proj(z)
    heads, size = [], made.dim // made.num_heads
    for h in range(made.num_heads):
        rows = []
        for asked in q[:, h]:
            scores = asked * k[:, h] * (1 if made.temperature is None else made.temperature[h, 0, 0])
            weights = (scores - scores.max()).exp()
            rows.append((weights / weights.sum()) @ v[:, h * size : (h + 1) * size])
        heads.append(torch.stack(rows))
    return made.o_proj(torch.cat(heads, 1)).view_as(x)


@pytest.mark.parametrize("config", [{}, {"reduction": "depthwise"}, {"temperature": True, "qkv_bias": False}])
@pytest.mark.parametrize(("ratio", "height", "width"), [(2, 4, 6), (1, 3, 2), (3, 3, 3)])
def test_it_is_its_definition(config: dict[str, object], ratio: int, height: int, width: int) -> None:
    made = layer(6, 2, ratio, **config)
    x = torch.randn(2, height, width, 6, dtype=torch.float64)
    want = torch.stack([naive(made, image, image) for image in x])
    torch.testing.assert_close(made(x), want, atol=1e-6, rtol=1e-6)
    context = torch.randn(2, 2 * ratio, ratio, 6, dtype=torch.float64)
    want = torch.stack([naive(made, *pair) for pair in zip(x, context, strict=True)])
    torch.testing.assert_close(made(x, context), want, atol=1e-6, rtol=1e-6)


def test_wide_queries_make_it_spatial_reduction_attention() -> None:
    made = layer(8, 2, 2, qk_dim=4)
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    z = F.conv2d(x.movedim(-1, 1), made.reduce[0].weight, made.reduce[0].bias, stride=2).flatten(2).mT
    z = F.layer_norm(z, (8,), made.reduce[2].weight, made.reduce[2].bias)
    q, k, v = (
        proj(t).unflatten(-1, (2, 4)).transpose(1, 2)
        for proj, t in ((made.q_proj, x.flatten(1, 2)), (made.k_proj, z), (made.v_proj, z))
    )
    want = made.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(made(x), want)


def test_rows_are_monotone_in_the_keys() -> None:
    """Values that are indicators of the keys make the output the weights."""
    made = layer(9, 1)
    x = torch.randn(1, 3, 3, 9, dtype=torch.float64)
    q, k = made.q_proj(x.flatten(1, 2))[0, :, 0], made.k_proj(x.flatten(1, 2))[0, :, 0]
    made.v_proj = Indicators()
    made.o_proj = torch.nn.Identity()
    weights = made(x).view(9, 9)
    assert (q > 0).any()
    assert (q < 0).any()
    for row, asked in zip(weights, q, strict=True):
        ordered = row[k.argsort(descending=bool(asked < 0))]
        assert (ordered.diff() >= 0).all()
        assert ordered[-1] > ordered[0]


class Indicators(torch.nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1)


def test_gradients() -> None:
    made = layer(4, 2, 2, temperature=True)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))


def test_padding_is_zeros() -> None:
    made, x = layer(6, 2, 2, pad=True), torch.randn(1, 3, 5, 6, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    torch.testing.assert_close(made(x), made(x, padded))
    with pytest.raises(ShapeError, match="sr_ratio"):
        layer(6, 2, 2)(x)


@pytest.mark.parametrize("reduction", ["conv", "depthwise"])
def test_the_cost_is_the_formula(reduction: str) -> None:
    dim, heads, ratio, n = 48, 1, 8, 56 * 56
    m = n // ratio**2
    with torch.device("meta"):
        made, x = StripAttention(dim, heads, ratio, reduction=reduction), torch.empty(1, 56, 56, dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x)
    reduced = n * dim**2 if reduction == "conv" else n * dim + m * dim**2
    pairs = n * m * (heads + dim)
    rest = n * dim * heads + reduced + m * dim * heads + m * dim**2 + n * dim**2
    assert counter.get_total_flops() / 2 == pairs + rest
    assert 2 * n * n * dim / pairs == pytest.approx(125, rel=0.01)


def test_the_order_of_a_block() -> None:
    torch.manual_seed(0)
    block = HybridPerceptionBlock(8, 2, 2, mlp_ratio=2).eval()
    x = torch.randn(1, 4, 4, 8)
    f1 = block.conv(x) + x
    f2 = block.attn(block.norm1(f1)) + f1
    f3 = block.local(block.norm2(f2)) + f2
    torch.testing.assert_close(block(x), block.mlp(block.norm3(f3)) + f3)


def test_sizes_and_costs_grow() -> None:
    names = ["s2aformer-mini", "s2aformer-t", "s2aformer-xs", "s2aformer-s", "s2aformer-m"]
    for count in (millions, gigamacs):
        counts = [count(name) for name in names]
        assert counts == sorted(counts)
    assert gigamacs("s2aformer-mini") < gigamacs("s2aformer-mini", sr_ratios=(1, 1, 1, 1)) / 1.5


def test_any_size_with_padding() -> None:
    config = {"num_classes": 3, "dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (4, 2)}
    images = torch.randn(1, 3, 50, 34)
    with pytest.raises(ShapeError, match="sr_ratio"):
        regard.create("s2aformer", **config)(images)
    model = regard.create("s2aformer", **config, pad=True).eval()
    assert model(images).shape == (1, 3)
    assert [tuple(f.shape) for f in model.forward_features(images)] == [(1, 13, 9, 8), (1, 7, 5, 16)]


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="num_heads"):
        StripAttention(8, 3)
    with pytest.raises(ArgumentError, match="sr_ratio"):
        StripAttention(8, 2, 0)
    with pytest.raises(ArgumentError, match="qk_dim"):
        StripAttention(8, 2, qk_dim=0)
    with pytest.raises(ArgumentError, match="reduction"):
        StripAttention(8, 2, reduction="pool")
    with pytest.raises(ShapeError, match="context: expected"):
        StripAttention(8, 2)(torch.randn(1, 2, 2, 8), torch.randn(1, 4, 8))
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("s2aformer", depths=(1, 1))
