"""UltraGen's branches against what they are by definition."""

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.video.ultragen import UltraGenAttention, window_mask
from regard.positions import rotary_angles, rotate

GRID = (2, 8, 8)


def module(**config) -> UltraGenAttention:
    torch.manual_seed(0)
    return UltraGenAttention(**{"dim": 12, "num_heads": 2, "windows": 2, "lora_rank": 3, "global_factor": 2, **config})


def video(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *GRID, 12, generator=generator), torch.tensor([0.1, 0.9])


def dense(layer: UltraGenAttention, z: torch.Tensor, mask=None) -> torch.Tensor:
    x = z.flatten(1, 3)
    q, k, v = (p.unflatten(-1, (2, 6)).transpose(1, 2) for p in layer.qkv(x).chunk(3, -1))
    return layer.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)).view(z.shape)


def same_window(windows: int, odd: bool, size: int = 8) -> torch.Tensor:
    """(tokens, tokens) bool in plain loops: borders every size/K, half of that further in odd layers."""
    step = size // windows
    shift = step // 2 if odd else 0
    cells = [((y + shift) // step, (x + shift) // step) for _ in range(2) for y in range(size) for x in range(size)]
    return torch.tensor([[a == b for b in cells] for a in cells])


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_new_block_is_window_attention(layer_idx: int) -> None:
    layer = module(layer_idx=layer_idx)
    z, t = video()
    torch.testing.assert_close(layer(z, t), dense(layer, z, same_window(2, bool(layer_idx))), atol=1e-5, rtol=1e-5)


def test_one_window_is_the_hosts_full_attention() -> None:
    layer = module(windows=1)
    z, t = video()
    torch.testing.assert_close(layer(z, t), dense(layer, z), atol=1e-5, rtol=1e-5)


def open_gate(layer: UltraGenAttention, whole: float, coarse: float) -> None:
    with torch.no_grad():
        layer.gates[2].bias.copy_(torch.tensor([whole, coarse]).repeat_interleave(12))


def test_the_global_branch_is_attention_over_cell_means() -> None:
    layer = module()
    open_gate(layer, 1.0, 0.0)
    z, t = video()
    means = F.avg_pool2d(z.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).unflatten(0, (2, 2))
    small = dense(layer, means).flatten(0, 1).permute(0, 3, 1, 2)
    want = F.interpolate(small, scale_factor=2, mode="bilinear").permute(0, 2, 3, 1).unflatten(0, (2, 2))
    torch.testing.assert_close(layer(z, t), want, atol=1e-5, rtol=1e-5)


def test_the_coarse_branch_sees_windows_twice_as_large() -> None:
    layer = module(windows=4)
    open_gate(layer, 0.0, 1.0)
    z, t = video()
    other = z.clone()
    other[:, :, 6:, 6:] += 1.0  # the last window of 4 x 4, in the last of 2 x 2
    changed = (layer(other, t) - layer(z, t)).abs().amax((0, 1, 4)) > 1e-6
    assert bool(changed[5:, 5:].all())  # up-sampling reaches over the border by a cell
    assert not bool(changed[:3, :3].any())


def test_new_lora_changes_nothing_but_trains() -> None:
    layer = module()
    open_gate(layer, 0.5, 0.5)
    z, t = video()
    before = layer(z, t)
    assert torch.equal(layer.glob.lora(z), torch.zeros(*z.shape[:-1], 36))
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        layer.glob.lora.up.normal_()
    assert not torch.allclose(layer(z, t), before)


def test_odd_and_even_layers_connect_all_neighbours() -> None:
    even, odd = (window_mask(GRID, 4, odd).dense(128, 128).view(128, 128) for odd in (False, True))
    index = torch.arange(128).view(GRID)
    for a, b in ((index[:, 1:], index[:, :-1]), (index[:, :, 1:], index[:, :, :-1])):
        assert bool((even | odd)[a.flatten(), b.flatten()].all())
        assert not bool(even[a.flatten(), b.flatten()].all())


def test_even_layout_has_one_window_more_per_axis() -> None:
    mask = window_mask(GRID, 2, True, "even").dense(128, 128).view(128, 128)
    assert sorted({int(row.sum()) for row in mask}) == [2 * 2 * 2, 2 * 2 * 3, 2 * 3 * 3]  # 8 = 3 + 3 + 2


@pytest.mark.parametrize("factor", [1, 2])
def test_positions_of_pooled_tokens_are_the_centres_of_their_cells(factor: int) -> None:
    layer = module(dim=24, rope_theta=100.0)
    x = torch.randn(1, 2, 32, 12)
    got = layer._rotate(x, (2, 4, 4), factor)
    centres = (torch.arange(4) + 0.5) * factor - 0.5
    want = rotate(x[..., 8:12], *rotary_angles(centres.repeat(8), 4, 100.0))
    torch.testing.assert_close(got[..., 8:12], want)


def test_gradients_in_float64() -> None:
    layer = UltraGenAttention(4, 2, windows=2, lora_rank=1, global_factor=2, coarse_factor=2, time_dim=4).double()
    with torch.no_grad():
        layer.gates[2].bias.fill_(0.3)
    z = torch.randn(1, 1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: layer(z, torch.tensor([0.5], dtype=torch.float64)), (z,))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"windows": 3}, "windows: expected 1 or an even number"),
        ({"layout": "random"}, "layout: expected one of"),
        ({"num_heads": 5}, "5 heads do not divide"),
        ({"rope_theta": 10.0, "num_heads": 4}, "head_dim of at least 6"),
        ({"lora_rank": 0}, "rank: expected at least 1"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        module(**config)


def test_bad_inputs() -> None:
    with pytest.raises(ShapeError, match=r"z: expected \(B, T, H, W, 12\)"):
        module()(torch.zeros(2, 8, 8, 12), torch.zeros(2))
    with pytest.raises(ShapeError, match="must divide height and width"):
        module(windows=4)(torch.zeros(1, 2, 6, 6, 12), torch.zeros(1))
    with pytest.raises(ShapeError, match=r"t: expected \(1,\)"):
        module()(torch.zeros(1, 2, 8, 8, 12), torch.zeros(3))
