"""Long short distance attention against dense attention under its masks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.lsda import LSDAttention, long_distance, short_distance


def dense(layer: LSDAttention, x: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
    """Pair by pair over the whole grid; the bias from the network, offset by offset."""
    b, h, w, c = x.shape
    q, k, v = layer.qkv(x.flatten(1, 2)).view(b, h * w, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = torch.full((b, layer.num_heads, h * w, h * w), -torch.inf, dtype=x.dtype)
    pos = layer.pos
    for i, j in mask.nonzero().tolist():
        dy, dx = (i // w - j // w) // step, (i % w - j % w) // step
        bias = pos.pos3(pos.pos2(pos.pos1(pos.pos_proj(torch.tensor([dy, dx], dtype=x.dtype)))))
        scores[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) * (c / layer.num_heads) ** -0.5 + bias
    return layer.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, h, w, c))


@pytest.mark.parametrize("mode", ["short", "long"])
@pytest.mark.parametrize(("height", "width", "interval"), [(8, 4, 2), (4, 8, 2), (5, 7, 2), (7, 3, 3), (6, 6, None)])
def test_it_is_dense_attention_under_its_mask(mode: str, height: int, width: int, interval: int | None) -> None:
    """With grids that must be filled up (at the end, so that the groups of the mask are the groups of the layer)."""
    torch.manual_seed(0)
    layer = LSDAttention(16, 2, 2, interval, mode).double()
    x = torch.randn(2, height, width, 16, dtype=torch.float64)
    step = 1 if mode == "short" else interval or -(-height // 2)
    pattern = short_distance((height, width), 2) if mode == "short" else long_distance((height, width), 2, step)
    mask = pattern.dense(height * width, height * width).view(height * width, -1)
    torch.testing.assert_close(layer(x), dense(layer, x, mask, step))


@pytest.mark.parametrize(("group_size", "interval"), [(2, 2), (2, 3), (3, 1)])
def test_the_patterns_in_words(group_size: int, interval: int) -> None:
    near, far = short_distance((7, 5), group_size), long_distance((7, 5), group_size, interval)
    region = group_size * interval
    for q in range(35):
        for k in range(35):
            (y, x), (v, u) = divmod(q, 5), divmod(k, 5)
            pair = torch.tensor(q), torch.tensor(k)
            assert bool(near(0, 0, *pair)) == ((y // group_size, x // group_size) == (v // group_size, u // group_size))
            same_region = (y // region, x // region) == (v // region, u // region)
            assert bool(far(0, 0, *pair)) == (same_region and (y - v) % interval == 0 == (x - u) % interval)


@pytest.mark.parametrize("mode", ["short", "long"])
def test_filling_up_on_both_sides_shifts_the_groups(mode: str) -> None:
    torch.manual_seed(0)
    both, end = LSDAttention(16, 2, 2, 2, mode, pad_type=1), LSDAttention(16, 2, 2, 2, mode, mask_padding=False)
    end.load_state_dict(both.state_dict())
    multiple = 2 if mode == "short" else 4
    before, after = (0, 1) if mode == "short" else (1, 2)
    x = torch.randn(1, 9, 9, 16)
    shifted = end(torch.nn.functional.pad(x, (0, 0, before, after, before, after)))
    inner = slice(multiple - before, 2 * multiple - before)  # a group without padding among its keys
    torch.testing.assert_close(both(x)[:, inner, inner], shifted[:, multiple : 2 * multiple, multiple : 2 * multiple])
    assert not torch.allclose(both(x)[:, -1, -1], shifted[:, before + 8, before + 8]), "padding is no key"


def test_near_then_far_reaches_everything() -> None:
    torch.manual_seed(0)
    near, far = LSDAttention(16, 1, 4, 2, "short"), LSDAttention(16, 1, 4, 2, "long")
    x = torch.randn(1, 8, 8, 16, requires_grad=True)  # H = G I
    for y, seen in ((near(x), 16), (far(x), 16), (far(near(x)), 64)):
        gradient = torch.autograd.grad(y[0, 3, 5].sum(), x)[0]
        assert int((gradient[0].abs().amax(-1) > 0).sum()) == seen


@pytest.mark.parametrize("mode", ["short", "long"])
def test_a_grid_no_larger_than_a_group_is_windows_of_its_side(mode: str) -> None:
    torch.manual_seed(0)
    layer, plain = LSDAttention(16, 2, 7, 8, mode), LSDAttention(16, 2, 3, 1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 6, 16)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("mode", ["short", "long"])
def test_gradients(mode: str) -> None:
    torch.manual_seed(0)
    layer = LSDAttention(16, 2, 2, 2, mode).double()
    x = torch.randn(1, 3, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_cost_is_that_of_small_groups() -> None:
    counts = {}
    for mode, group_size in (("short", 7), ("long", 7), ("short", 56)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            LSDAttention(64, 2, group_size, 8, mode)(torch.empty(1, 56, 56, 64))
        counts[mode, group_size] = counter.flop_counts["Global"]
    products = {key: sum(v for op, v in c.items() if "addmm" not in str(op)) for key, c in counts.items()}
    assert products["short", 7] == products["long", 7] == products["short", 56] * 49 // 3136


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="mode"):
        LSDAttention(16, 2, mode="middle")
    with pytest.raises(ArgumentError, match="interval"):
        LSDAttention(16, 2, interval=0)
    with pytest.raises(ArgumentError, match="pad_type"):
        LSDAttention(16, 2, pad_type=2)
    with pytest.raises(ArgumentError, match="hidden_dim"):
        LSDAttention(8, 2)
    with pytest.raises(ShapeError, match="x: expected"):
        LSDAttention(16, 2)(torch.randn(1, 4, 16))
