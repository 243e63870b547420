"""Position-aware tokens against loops, the two limits of α, and the block around them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.dual_token import BiDimAttention, DualTokenBlock, MixMLP, PositionAwareTokenModule


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module.double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def attended(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """(N, C) and (M, C) to (N, C), number by number."""
    out, d = torch.zeros_like(q), q.shape[1] // num_heads
    for i in range(len(q)):
        for h in range(0, q.shape[1], d):
            weights = torch.stack([(q[i, h : h + d] * key[h : h + d]).sum() / d**0.5 for key in k]).softmax(0)
            out[i, h : h + d] = sum(w * value[h : h + d] for w, value in zip(weights, v, strict=True))
    return out


def halved(step: nn.ModuleDict, z: Tensor) -> Tensor:
    """(H, W, C): a depthwise convolution by the sum over neighbours, then means of four pixels."""
    conv, (height, width, _) = step["conv"], z.shape
    y = conv.bias.expand_as(z).clone()
    for r in range(height):
        for c in range(width):
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < height and 0 <= c + dc < width:
                        y[r, c] += conv.weight[:, 0, dr + 1, dc + 1] * z[r + dr, c + dc]
    means = [
        [y[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for c in range(width // 2)] for r in range(height // 2)
    ]
    return step["norm"](torch.stack([torch.stack(row) for row in means]))


@pytest.mark.parametrize(
    ("grid", "size", "halvings", "changes"),
    [
        ((2, 2), (8, 8), 2, {}),
        ((2, 3), (4, 6), 1, {"mlp": "mix", "mlp_ratio": 2, "alpha": "channel", "qkv_bias": False}),
        ((2, 2), (4, 4), 1, {"downsample_norm": True}),
        ((2, 2), (2, 2), 0, {}),
    ],
)
def test_it_is_its_definition(grid, size, halvings, changes) -> None:
    layer = randomised(PositionAwareTokenModule(4, 2, grid, num_downsamples=2, **changes))
    x_local, x, tokens = images(2, *size, 4), images(2, *size, 4).flip(0), images(2, grid[0] * grid[1], 4)
    x_global, new = layer(x_local, tokens, x)
    for b in range(2):
        z = x_local[b]
        for step in layer.downsamples[:halvings]:
            z = halved(step, z)
        assert z.shape[:2] == grid
        gathered = attended(*layer.aggregate(z.reshape(-1, 4)).chunk(3, -1), 2)
        mlp = layer.mlp.mlp if isinstance(layer.mlp, MixMLP) else layer.mlp
        g = tokens[b].T if isinstance(layer.mlp, MixMLP) else tokens[b]
        remembered = F.gelu(g @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
        remembered = remembered.T if isinstance(layer.mlp, MixMLP) else remembered
        want = layer.alpha * remembered + (1 - layer.alpha) * gathered
        close(new[b], want)
        read = attended(layer.q_proj(x[b].reshape(-1, 4)), *layer.kv_proj(want).chunk(2, -1), 2)
        close(x_global[b].reshape(-1, 4), layer.o_proj(read))


def test_alpha_zero_is_attention_in_two_steps() -> None:
    layer, x = randomised(PositionAwareTokenModule(4, 2, (3, 5))), images(2, 3, 5, 4)
    with torch.no_grad():
        layer.alpha.zero_()
    x_global, new = layer(x, images(2, 15, 4))

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (2, 2)).transpose(1, 2)

    def mha(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)

    flat = x.flatten(1, 2)
    first = mha(*layer.aggregate(flat).chunk(3, -1))
    close(new, first)
    close(x_global.flatten(1, 2), layer.o_proj(mha(layer.q_proj(flat), *layer.kv_proj(first).chunk(2, -1))))
    close(layer(x, images(2, 15, 4).flip(1))[0], x_global)  # what was learned does not matter


def test_alpha_one_reads_the_learned_tokens_alone() -> None:
    layer, x, tokens = randomised(PositionAwareTokenModule(4, 2, (2, 2))), images(1, 4, 4, 4), images(1, 4, 4)
    layer.mlp = nn.Identity()
    with torch.no_grad():
        layer.alpha.fill_(1)
    x_global, new = layer(x, tokens)
    assert torch.equal(new, tokens)
    read = attended(layer.q_proj(x[0].flatten(0, 1)), *layer.kv_proj(tokens[0]).chunk(2, -1), 2)
    close(x_global[0].flatten(0, 1), layer.o_proj(read))
    close(layer(x, tokens[:, [2, 0, 3, 1]])[0], x_global)  # without the image they have no places


def test_tokens_stand_for_places() -> None:
    layer, x, tokens = randomised(PositionAwareTokenModule(4, 2, (2, 2))), 3 * images(1, 4, 4, 4), 3 * images(1, 4, 4)
    x_global, _ = layer(x, tokens)
    assert (layer(x, tokens[:, [2, 0, 3, 1]])[0] - x_global).abs().max() > 1e-3


def test_images_of_any_size() -> None:
    layer = randomised(PositionAwareTokenModule(2, 1, (7, 7)))
    for side, halvings in ((28, 2), (14, 1), (7, 0), (27, 1), (56, 2), (10, 0), (3, 0)):
        x, z = images(1, side, side, 2), images(1, side, side, 2)
        for step in layer.downsamples[:halvings]:
            y = F.conv2d(z.movedim(-1, 1), step["conv"].weight, step["conv"].bias, padding=1, groups=2)
            z = F.avg_pool2d(y, 2).movedim(1, -1)
        close(layer.downsample(x), F.adaptive_avg_pool2d(z.movedim(-1, 1), 7).movedim(1, -1))
    x_global, new = layer(images(2, 15, 30, 2), images(2, 49, 2))
    assert x_global.shape == (2, 15, 30, 2)
    assert new.shape == (2, 49, 2)


def test_channels_and_places_are_scaled() -> None:
    layer, x = randomised(BiDimAttention(8)), images(2, 3, 5, 8)
    for b in range(2):
        normed = layer.norm(x[b])
        g = F.gelu(layer.global_reduce(sum(normed[r, c] for r in range(3) for c in range(5)) / 15))
        for r in range(3):
            for c in range(5):
                u = F.gelu(layer.local_reduce(normed[r, c]))
                place = 1 / (1 + (-layer.spatial_select(torch.cat([u, g]))).exp())
                close(layer(x)[b, r, c], x[b, r, c] * place / (1 + (-layer.channel_select(g)).exp()))


@pytest.mark.parametrize("queries", ["input", "local"])
@pytest.mark.parametrize("residual", ["once", "twice"])
def test_a_block_is_its_equations(queries, residual) -> None:
    block = randomised(
        DualTokenBlock(4, 2, 2.0, (2, 2), queries=queries, residual=residual, conv_ratio=2, layer_scale=0.5)
    )
    x, tokens = images(2, 5, 4, 4), images(2, 4, 4)
    y, c = block.norm1(x), block.conv
    h = F.conv2d(y.movedim(-1, 1), c.dwconv.weight, c.dwconv.bias, padding=3, groups=4).movedim(1, -1)
    conv = c.mlp.fc2(F.gelu(c.mlp.fc1(c.norm(h)))) * c.scale.gamma
    x_global, want_tokens = block.tokens(y + conv, tokens, y if queries == "input" else y + conv)
    want = x + conv + x_global + (y if residual == "twice" else 0)
    mlp, gate = block.mlp
    want = want + gate(mlp.fc2(F.gelu(mlp.fc1(block.norm2(want)))))
    got, got_tokens = block(x, tokens)
    close(got, want)
    close(got_tokens, want_tokens)


def test_gradients() -> None:
    block = randomised(DualTokenBlock(4, 2, 1.0, (2, 1), conv_ratio=1, num_downsamples=1))
    x, tokens = images(1, 4, 3, 4).requires_grad_(), images(1, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(block, (x, tokens))


def test_refusals() -> None:
    layer = PositionAwareTokenModule(4, 2, (2, 2))
    with pytest.raises(ShapeError, match=r"x_local: expected \(B, H, W, 4\)"):
        layer(torch.randn(1, 4, 4, 3), torch.randn(1, 4, 4))
    with pytest.raises(ShapeError, match=r"global_tokens: expected \(1, 4, 4\)"):
        layer(torch.randn(1, 4, 4, 4), torch.randn(1, 5, 4))
    with pytest.raises(ShapeError, match="x: expected the shape"):
        layer(torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4), torch.randn(1, 2, 2, 4))
    for name, value in {
        "num_heads": 3,
        "token_grid": (0, 2),
        "mlp": "other",
        "alpha": "both",
        "num_downsamples": -1,
    }.items():
        with pytest.raises(ArgumentError, match=name):
            PositionAwareTokenModule(**{"dim": 4, "num_heads": 2, name: value})
    for name in ("queries", "residual"):
        with pytest.raises(ArgumentError, match=name):
            DualTokenBlock(4, 2, **{name: "other"})
    with pytest.raises(ArgumentError, match="ratio"):
        BiDimAttention(2)
