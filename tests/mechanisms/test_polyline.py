"""Polyline path masks against walks along the paths; both forms of the attention against their equations."""

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.polyline import PolylinePathAttention, PolylinePathMask


def layer(form: str, dim: int = 8, num_heads: int = 2) -> PolylinePathAttention:
    torch.manual_seed(0)
    made = PolylinePathAttention(dim, num_heads, form).double()
    torch.nn.init.normal_(made.path_embed.dt_linear.weight)
    torch.nn.init.normal_(made.path_embed.dt_bias)
    torch.nn.init.normal_(made.path_embed.A_log)
    return made


def walked(alpha: Tensor, beta: Tensor, query: tuple[int, int], key: tuple[int, int], row_first: bool) -> Tensor:
    """Decays (H, W) of the steps from one pixel to another: each step's is that of its end further right or down."""
    (r, i), (s, j) = query, key
    row, column = (r, j) if row_first else (s, i)
    total = alpha.new_zeros(())
    while i != j:
        total = total + alpha[row, max(i, i + (1 if j > i else -1))]
        i += 1 if j > i else -1
    while r != s:
        total = total + beta[max(r, r + (1 if s > r else -1)), column]
        r += 1 if s > r else -1
    return total


def naive_masks(mask: PolylinePathMask, x: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, N, N) of one image (H, W, C), for the two paths."""
    height, width, _ = x.shape
    pixels = [(r, i) for r in range(height) for i in range(width)]
    both = []
    for row_first in (True, False):
        heads = []
        for h in range(mask.num_heads):
            own = x[..., h * mask.head_dim : (h + 1) * mask.head_dim] @ mask.dt_linear.weight.T
            step = (1 + (own + mask.dt_bias[h]).exp()).log() * -mask.A_log[h].exp()
            alpha, beta = step[..., 0], step[..., 1]
            rows = [torch.stack([walked(alpha, beta, p, q, row_first) for q in pixels]) for p in pixels]
            heads.append(torch.stack(rows))
        both.append(torch.stack(heads))
    return both[0], both[1]


def test_the_masks_are_sums_along_two_polylines() -> None:
    mask = layer("whole").path_embed
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    dense = mask.dense(x)
    for got, image in zip(dense, x, strict=True):
        one, other = naive_masks(mask, image)
        torch.testing.assert_close(got, one, atol=1e-12, rtol=0)
        torch.testing.assert_close(got.mT, other, atol=1e-12, rtol=0)
    assert dense.max() == 0
    rows, columns = mask(x)
    assert rows.shape == (2, 3, 2, 4, 4)
    assert columns.shape == (2, 4, 2, 3, 3)
    grid = dense.unflatten(3, (3, 4)).unflatten(2, (3, 4))
    torch.testing.assert_close(rows[:, 1], grid[:, :, 1, :, 1])
    torch.testing.assert_close(columns[:, 2], grid[:, :, :, 2, :, 2])


def test_equal_decays_are_a_manhattan_mask() -> None:
    mask = layer("whole").path_embed
    torch.nn.init.zeros_(mask.dt_linear.weight)
    c = mask.A_log.exp() * mask.dt_bias.exp().log1p()
    height, width = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    distance = (height[:, None] - height).abs() + (width[:, None] - width).abs()
    got = mask.dense(torch.randn(1, 4, 3, 8, dtype=torch.float64))[0]
    torch.testing.assert_close(got, -c[:, None, None] * distance)


def naive_attention(made: PolylinePathAttention, x: Tensor) -> Tensor:
    """One image (H, W, C) to what `o_proj` gets, without the convolution."""
    height, width, _ = x.shape
    n, d = height * width, made.head_dim
    q, k, v = (p(x).reshape(n, made.num_heads, d) for p in (made.q_proj, made.k_proj, made.v_proj))

    def turned(t: Tensor) -> Tensor:
        out = torch.empty_like(t)
        for place in range(n):
            for m in range(d // 2):
                angle = torch.tensor(place * 10_000.0 ** -(m / (d // 2 - 1)), dtype=torch.float32).double()
                a, b = t[place, :, m], t[place, :, m + d // 2]
                out[place, :, m] = a * angle.cos() - b * angle.sin()
                out[place, :, m + d // 2] = b * angle.cos() + a * angle.sin()
        return out

    q, k = turned(q), turned(k)
    one, other = naive_masks(made.path_embed, x)
    same = torch.arange(n) // width
    line = [same[:, None] == same, (torch.arange(n) % width)[:, None] == torch.arange(n) % width]
    out = torch.empty(n, made.num_heads, d, dtype=x.dtype)
    for h in range(made.num_heads):
        s = q[:, h] @ k[:, h].T / d**0.5
        if made.form == "whole":
            out[:, h] = ((s + one[h]).softmax(-1) + (s + other[h]).softmax(-1)) @ v[:, h] / 2
        else:
            rows, columns = ((s + one[h]).masked_fill(~seen, -torch.inf).softmax(-1) for seen in line)
            out[:, h] = (columns @ rows + rows @ columns) @ v[:, h] / 2
    return out.reshape(x.shape)


@pytest.mark.parametrize("form", ["whole", "chunk"])
@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 5), (5, 1), (1, 1)])
def test_it_is_its_equation(form: str, height: int, width: int) -> None:
    made = layer(form)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    want = torch.stack([naive_attention(made, image) for image in x]) + made.lepe(made.v_proj(x))
    torch.testing.assert_close(made(x), made.o_proj(want), atol=1e-6, rtol=1e-5)  # angles are float32


@pytest.mark.parametrize("form", ["whole", "chunk"])
def test_a_wall_stops_attention(form: str) -> None:
    """Column 2 decays hard; where a pixel right of it changes, those left of it do not."""
    made = layer(form, num_heads=1)
    torch.nn.init.zeros_(made.lepe.weight)
    with torch.no_grad():
        made.path_embed.dt_linear.weight.zero_()[0, 0] = 1.0
        made.path_embed.A_log.zero_()
        made.path_embed.dt_bias.fill_(-5.0)
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    x[..., 0] = 0.0
    other = x.clone()
    other[:, 1:3, 3, 1:] += 1.0  # not the channel from which decays are made

    def moved() -> Tensor:
        return (made(x) - made(other)).abs().amax(-1)[0]

    assert moved()[1:3, :2].min() > 1e-4
    x[:, :, 2, 0] = other[:, :, 2, 0] = 100.0
    assert moved()[:, :2].max() < 1e-12
    assert moved()[1:3, 3:].min() > 1e-4


@pytest.mark.parametrize("form", ["whole", "chunk"])
def test_gradients(form: str) -> None:
    made = layer(form, dim=4)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = (made.path_embed.A_log, made.path_embed.dt_bias, made.path_embed.dt_linear.weight)
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, *weights))


def test_the_chunk_form_makes_no_square_of_the_pixels() -> None:
    made = layer("chunk").float()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    with torch.no_grad(), Watch():
        made(torch.randn(1, 24, 32, 8))
    assert max(sizes) <= 2 * 24 * 32 * 32  # heads · N · longest line


def test_published_weights_and_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="even"):
        PolylinePathAttention(6, 2)
    with pytest.raises(ArgumentError, match="form"):
        PolylinePathAttention(8, 2, "rows")
    with pytest.raises(ArgumentError, match="num_heads"):
        PolylinePathAttention(8, 3)
    with pytest.raises(ShapeError, match="x: expected"):
        PolylinePathAttention(8, 2)(torch.randn(1, 6, 8))
    with pytest.raises(ShapeError, match="x: expected"):
        PolylinePathMask(4, 2).dense(torch.randn(1, 2, 3, 4))
    with pytest.raises(Unsupported, match="value_factor"):
        PolylinePathAttention.from_official({}, embed_dim=8, num_heads=2, value_factor=2)
    with pytest.raises(ArgumentError, match=r"missing o_proj\.bias"):
        PolylinePathAttention.from_official({}, embed_dim=8, num_heads=2)
