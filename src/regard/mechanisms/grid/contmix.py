"""Context-mixing dynamic kernels (OverLoCK): every pixel filters its neighbourhood, by a kernel made from the image."""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.errors import ArgumentError, ShapeError
from regard.layers.conv_bn import ConvBN
from regard.mechanisms.grid.base import GridMechanism

_POOL = 7  # the context is summarised in 7×7 places
_STRIP = 64  # columns filtered at a time


def dynamic_filter(x: Tensor, kernels: Tensor) -> Tensor:
    """``y_p = Σ_j kernels_pj x_n(p, j)``: j runs over the K×K window around p, moved so that it stays inside the grid.

    Goes through the window row by row. There the kernels of a strip of columns are a small band matrix, which is
    multiplied densely; nothing as large as all windows exists, also not in the backward.

    Args:
        x: (B, G, H, W, C).
        kernels: (B, G, H, W, K²).

    Returns:
        (B, G, H, W, C).

    Raises:
        ShapeError: the window is larger than the grid.
    """
    size = round(kernels.shape[-1] ** 0.5)
    height, width = x.shape[2:4]
    if min(height, width) < size:
        raise ShapeError(f"x: expected a grid of at least {size} x {size}, the window, got {height} x {width}")
    top, left = _starts(height, size, x.device), _starts(width, size, x.device)
    strips = []
    for first in range(0, width, _STRIP):
        last = min(first + _STRIP, width)
        begin, end = (min(max(column - size // 2, 0), width - size) for column in (first, last - 1))
        near, columns = x[:, :, :, begin : end + size], left[first:last, None] + torch.arange(size, device=x.device)
        strips.append(_strip(near, kernels[:, :, :, first:last], top, columns - begin))
    return torch.cat(strips, 3)


def window_bias(table: Tensor, height: int, width: int) -> Tensor:
    """(G, 2K - 1, 2K - 1), by the offset key minus query, to (G, H, W, K²) for the windows of `dynamic_filter`."""
    size = (table.shape[-1] + 1) // 2
    rows, columns = (
        _starts(length, size, table.device)[:, None]
        + torch.arange(size, device=table.device)
        - torch.arange(length, device=table.device)[:, None]
        + size
        - 1
        for length in (height, width)
    )
    return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(-2)


class ContMix(GridMechanism):
    """Kernels of two sizes for every pixel and group, from a 7×7 summary of a context (arXiv:2502.20087).

        Q = BN(x Wq) / √D,  K = BN(pool7x7(c) Wk)                     G groups, D = C / G
        kernels = softmax((Q Kᵀ) Wp + b + relative position)          S² + K² numbers, a softmax over each window
        y = BN([Σ small kernel ∘ V1, Σ large kernel ∘ V2] Wo)         V1, V2 halves of V = BN(x Wv)

    x (B, H, W, C) to the same, at any size; exact, noncausal. Kernels know the whole context but reach only their
    window, which stays inside the image as in neighbourhood attention. Images smaller than K are enlarged and the
    outputs averaged back. As kernels are linear in Q, the summary goes through Wp first: no affinities of all pixels.

    Args:
        dim: C, a multiple of ``4 * num_heads``.
        kernel_size, small_kernel_size: K and S, odd.
        num_heads: G / 2, as it was published.
        context_dim: channels of the context, C by default.
        value_proj: whether there is Wv; the published network does without.
        bias_std: of the relative positions at first.
    """

    cost: ClassVar[str] = "O(N C (C + K²)), N = H W"

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        context_dim: int | None = None,
        value_proj: bool = True,
        bias_std: float = 0.02,
    ):
        super().__init__()
        for name, size in (("kernel_size", kernel_size), ("small_kernel_size", small_kernel_size)):
            if size < 1 or size % 2 == 0:
                raise ArgumentError(f"{name}: expected an odd number, got {size}")
        if small_kernel_size > kernel_size:
            raise ArgumentError(f"small_kernel_size: expected at most {kernel_size}, got {small_kernel_size}")
        if num_heads < 1 or dim % (4 * num_heads):
            raise ArgumentError(f"num_heads: 4 x {num_heads} does not divide dim {dim}")
        self.dim, self.kernel_size, self.small_kernel_size = dim, kernel_size, small_kernel_size
        self.groups = 2 * num_heads
        self.context_dim = dim if context_dim is None else context_dim
        self.query = ConvBN(dim, dim // 2)
        self.key = ConvBN(self.context_dim, dim // 2)
        self.value = ConvBN(dim, dim) if value_proj else nn.Identity()
        self.kernel_proj = nn.Linear(_POOL**2, small_kernel_size**2 + kernel_size**2)
        self.small_bias, self.large_bias = (
            nn.Parameter(torch.randn(self.groups, 2 * size - 1, 2 * size - 1) * bias_std)
            for size in (small_kernel_size, kernel_size)
        )
        self.proj = ConvBN(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        """``context`` (B, H', W', context_dim) and ``values`` (B, H, W, C) are x by default."""
        small, large = self.kernels(x, context)
        v = self.value(self._enlarged(x if values is None else values, small.shape[2:4]))
        one, two = (rearrange(half, "b h w (g c) -> b g h w c", g=self.groups) for half in v.chunk(2, -1))
        y = torch.cat([dynamic_filter(one, small), dynamic_filter(two, large)], 1)
        y = rearrange(y, "b g h w c -> b (g c) h w")
        if y.shape[2:] != x.shape[1:3]:
            y = F.adaptive_avg_pool2d(y, (x.shape[1], x.shape[2]))
        return self.proj(y.movedim(1, -1))

    def kernels(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The small (B, G, H, W, S²) and large (B, G, H, W, K²) kernels, which sum to one; H, W ≥ K."""
        context = x if context is None else context
        for name, given, dim in (("x", x, self.dim), ("context", context, self.context_dim)):
            if given.dim() != 4 or given.shape[-1] != dim:
                raise ShapeError(f"{name}: expected (B, H, W, {dim}), got {tuple(given.shape)}")
        height, width = self._size(*x.shape[1:3])
        x, context = self._enlarged(x, (height, width)), self._enlarged(context, (height, width))
        scale = (self.dim // self.groups) ** -0.5
        q = rearrange(self.query(x) * scale, "b h w (g c) -> b g (h w) c", g=self.groups)
        pooled = F.adaptive_avg_pool2d(context.movedim(-1, 1), _POOL).movedim(1, -1)
        k = rearrange(self.key(pooled), "b h w (g c) -> b g c (h w)", g=self.groups)
        logits = (q @ F.linear(k, self.kernel_proj.weight) + self.kernel_proj.bias).unflatten(2, (height, width))
        wide = torch.promote_types(logits.dtype, torch.float32)
        small, large = logits.split([self.small_kernel_size**2, self.kernel_size**2], -1)
        small, large = (
            (part + window_bias(table, height, width)).softmax(-1, dtype=wide).to(part.dtype)
            for part, table in ((small, self.small_bias), (large, self.large_bias))
        )
        return small, large

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The grid, or if it is smaller than the window one whose short side is the window's."""
        size = self.kernel_size
        if min(height, width) >= size:
            return height, width
        if height < width:
            return size, max(size, int(size / height * width))
        return max(size, int(size / width * height)), size

    def _enlarged(self, x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
        """Bilinearly to a grid of ``size``, if x is smaller than the window."""
        if min(x.shape[1:3]) >= self.kernel_size:
            return x
        return F.interpolate(x.movedim(-1, 1), size, mode="bilinear").movedim(1, -1)


def _starts(length: int, size: int, device: torch.device) -> Tensor:
    """Where the window of each place begins."""
    return (torch.arange(length, device=device) - size // 2).clamp(0, length - size)


def _strip(x: Tensor, kernels: Tensor, top: Tensor, columns: Tensor) -> Tensor:
    """`dynamic_filter` of W columns, which see ``columns`` (W, K) of x (B, G, H, X, C)."""
    remember = torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad)
    size = columns.shape[1]
    out = x.new_zeros(*kernels.shape[:-1], x.shape[-1])
    for a, weights in enumerate(kernels.unflatten(-1, (size, size)).unbind(-2)):
        if remember and not torch.compiler.is_compiling():
            out = out + checkpoint(_row, x, weights, top + a, columns, use_reentrant=False)
        else:
            out = out + _row(x, weights, top + a, columns)
    return out


def _row(x: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One row of all windows: weights (B, G, H, W, K), which row (H,) and columns (W, K) of x they are for."""
    band = weights.new_zeros(*weights.shape[:-1], x.shape[3]).scatter(-1, columns.expand_as(weights), weights)
    return band @ x[:, :, rows]
