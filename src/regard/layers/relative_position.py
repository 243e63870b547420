"""Relative position biases of windows: one number per head and offset, from a table or from a small network."""

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers.weights import load_strictly


def window_shape(size: int | Sequence[int], name: str = "window_size") -> tuple[int, ...]:
    """(height, width) of a window from one number or one per axis.

    Raises:
        ArgumentError: a side is below 1.
    """
    shape = (size, size) if isinstance(size, int) else tuple(size)
    if not shape or min(shape) < 1:
        raise ArgumentError(f"{name}: expected sides of at least 1, got {size}")
    return shape


def relative_offsets(size: int | Sequence[int], device: torch.device | None = None) -> Tensor:
    """All offsets inside a window, from ``1 - size`` to ``size - 1`` per axis, row-major: (Π (2·side - 1), axes)."""
    axes = [torch.arange(1 - side, side, device=device) for side in window_shape(size)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def relative_index(size: int | Sequence[int]) -> Tensor:
    """Where `relative_offsets` has the offset query minus key, of all pairs of tokens in a window: (N, N)."""
    shape = window_shape(size)
    tokens = torch.tensor(list(product(*map(range, shape))))
    index = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
    for axis, side in enumerate(shape):
        index = index * (2 * side - 1) + tokens[:, None, axis] - tokens[None, :, axis] + side - 1
    return index


class RelativePositionBias(nn.Module):
    """``bias[h, i, j] = table[offset(i, j), h]`` with the offset query minus key (Swin, arXiv:2103.14030).

    The table has the order and shape in which it is usually published; `reversed_table` turns one around that counts
    key minus query. `regard.attention` takes the output as its ``bias``.

    Args:
        size: sides of the window.
        num_heads: H.

    Shapes:
        () to (H, N, N), N tokens in the window.
    """

    index: Tensor

    def __init__(self, size: int | Sequence[int], num_heads: int):
        super().__init__()
        self.size = window_shape(size)
        self.table = nn.Parameter(torch.empty(prod(2 * side - 1 for side in self.size), num_heads))
        self.register_buffer("index", relative_index(size), persistent=False)
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        return self.table.T[:, self.index]

    def extra_repr(self) -> str:
        return f"size={self.size}, num_heads={self.table.shape[1]}"


def reversed_table(table: Tensor) -> Tensor:
    """A published table (H, 2·height - 1, 2·width - 1) of offsets key minus query, as `RelativePositionBias` has it."""
    return table.flip((1, 2)).flatten(1).T.contiguous()


def load_resized(module: nn.Module, source: nn.Module) -> None:
    """Weights of the same network with other windows: tables are interpolated, everything else must fit.

    Bilinearly, as MaxViT is taken to larger images; ``module`` gets the weights of ``source`` in place.

    Raises:
        ArgumentError: something other than a table differs.
    """
    state, parts = source.state_dict(), dict(source.named_modules())
    for name, part in module.named_modules():
        old = parts.get(name)
        if isinstance(part, RelativePositionBias) and isinstance(old, RelativePositionBias):
            grid = old.table.detach().T.unflatten(-1, [2 * side - 1 for side in old.size])[None]
            grid = F.interpolate(grid, [2 * side - 1 for side in part.size], mode="bilinear")
            state[f"{name}.table" if name else "table"] = grid.flatten(2)[0].T
    load_strictly(module, state)


class DynamicPositionBias(nn.Module):
    """A network makes the table: ``bias[h, i, j] = MLP(offset(i, j))[h]``, for windows of any size (arXiv:2108.00154).

        p = W0 (Δy, Δx);  three times p = W ReLU(LN p), the last time to H numbers

    Args:
        dim: of the tokens; the network is ``dim // 16`` wide.
        num_heads: H.
        hidden_dim: another width.

    Shapes:
        (window size) to (H, N, N).
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int | None = None):
        super().__init__()
        width = dim // 16 if hidden_dim is None else hidden_dim
        if width < 1:
            raise ArgumentError(f"hidden_dim: expected at least 1, got {width} (dim // 16 by default)")
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, num_heads)
        )

    def forward(self, size: int | Sequence[int]) -> Tensor:
        weight = self.pos_proj.weight
        offsets = relative_offsets(size, weight.device).to(weight.dtype)
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))
        return table.T[:, relative_index(size).to(weight.device)]
