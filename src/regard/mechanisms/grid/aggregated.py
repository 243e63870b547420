"""Aggregated attention (TransNeXt): neighbours in detail and the whole image pooled, in one softmax."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import Partial, attention, merge
from regard.attention.grid import grid_attention
from regard.attention.grid_plan import Axis
from regard.attention.grid_slots import slot_sum
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.grid.base import GridMechanism

_CPB = {"cpb_fc1": "cpb.0", "cpb_fc2": "cpb.2"}


class CosineAttention(GridMechanism):
    """Global attention of TransNeXt's last stage: x (B, H, W, C) to the same, at any size.

        q̂, k̂ = normalised q, k        y_i = Σ_j softmax_j((q̂_i + E)·k̂_j softplus(τ) log N + MLP(i - j)) v_j

    Args:
        dim: C.
        num_heads: heads; E, a query for all tokens, and the temperature τ are learned per head.
        pretrain_grid: height and width, at least 2, of the grid whose distances the MLP learns; other grids are
            measured in the same units.
        qkv_bias: of the projections.
    """

    cost: ClassVar[str] = "O(N C² + N² C), N = H W"
    example: ClassVar[dict[str, Any]] = {"pretrain_grid": 14}

    def __init__(self, dim: int, num_heads: int, pretrain_grid: int | Sequence[int], qkv_bias: bool = True):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        grid = (pretrain_grid,) * 2 if isinstance(pretrain_grid, int) else tuple(pretrain_grid)
        if len(grid) != 2 or min(grid) < 2:
            raise ArgumentError(f"pretrain_grid: expected two sides of at least 2, got {pretrain_grid}")
        self.dim, self.num_heads, self.pretrain_grid = dim, num_heads, (grid[0], grid[1])
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), 1 / 0.24).expm1().log())  # softplus: 1 / 0.24
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.cpb = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads))
        self.proj = nn.Linear(dim, dim)
        self._projections(qkv_bias)

    def _projections(self, bias: bool) -> None:
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        grid = (x.shape[1], x.shape[2])
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x.flatten(1, 2)).chunk(3, -1))
        scale = torch.full((1,), float(grid[0] * grid[1]), dtype=x.dtype, device=x.device).log()
        _, q = self._queries(q, scale)
        y = attention(q, F.normalize(k, dim=-1), v, bias=self.position_bias(grid, grid), scale=1.0)
        return self._out(y, x)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        """What heads found, (B, heads, N, D), for the tokens x, to the output (B, H, W, C)."""
        return self.proj(merge_heads(y)).view_as(x)

    def _queries(self, q: Tensor, length_scale: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, N, D): q̂, and what meets the keys."""
        q = F.normalize(q, dim=-1)
        return q, (q + self.query_embedding) * F.softplus(self.temperature) * length_scale

    def position_bias(self, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
        """(heads, N, P): the MLP at the distances of a grid's tokens to the centres of its cells."""
        weight = self.cpb[0].weight
        table, index = (t.to(weight.device) for t in _coordinates(*grid, *pool, *self.pretrain_grid))
        return self.cpb(table.to(weight.dtype)).T[:, index]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[-1] != self.dim or 0 in x.shape:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        input_resolution: Sequence[int],
        num_heads: int = 8,
        qkv_bias: bool = True,
        pretrain_grid: Sequence[int] | None = None,
        further: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> "CosineAttention":
        """Weights of the published ``Attention``; ``further`` are arguments that only a subclass has."""
        module = cls(dim, num_heads, pretrain_grid or input_resolution, qkv_bias, **(further or {}))
        load_strictly(module, state_dict, _CPB)
        return module


class AggregatedAttention(CosineAttention):
    """Aggregated attention (TransNeXt, arXiv:2311.17132): x (B, H, W, C) to the same, at any size that can be pooled.

        s_ij = (q̂_i + E)·k̂_j softplus(τ) log(m_i + P)        b_o per offset o, MLP per distance
        A = softmax of s_ij + b_{j-i} over the m_i tokens around i, and of s_ip + MLP(i - p) over the P pooled ones
        y_i = Wo (Σ_j A_ij v_j + Σ_p A_ip v_p + Σ_o (q̂_i T + b_T)_o v_{i+o})

    Pooled keys and values are the same projections of ``LN(pool(GELU(W x)))``. The local and the pooled part are two
    `Partial`s, merged; the last sum, learned positional attention, is no softmax. Exact; noncausal.

    Args:
        dim, num_heads, pretrain_grid, qkv_bias: as in `CosineAttention`.
        window_size: side of the neighbourhood, odd; it is cut off at the borders.
        sr_ratio: the pooled grid is (H // sr_ratio, W // sr_ratio).
        pool_size: side of the pooled grid whatever the image, in place of sr_ratio; must be below H and W.
    """

    cost: ClassVar[str] = "O(N C² + N (window_size² + P) C)"
    example: ClassVar[dict[str, Any]] = {"pretrain_grid": 14, "sr_ratio": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_grid: int | Sequence[int],
        window_size: int = 3,
        sr_ratio: int = 8,
        pool_size: int | None = None,
        qkv_bias: bool = True,
    ):
        if window_size < 1 or window_size % 2 == 0:
            raise ArgumentError(f"window_size: expected an odd number, got {window_size}")
        if sr_ratio < 1 or (pool_size is not None and pool_size < 1):
            raise ArgumentError(f"sr_ratio, pool_size: expected at least 1, got {sr_ratio} and {pool_size}")
        super().__init__(dim, num_heads, pretrain_grid, qkv_bias)
        self.window_size, self.sr_ratio, self.pool_size = window_size, sr_ratio, pool_size
        self.sr = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window_size**2))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, window_size**2))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, window_size**2))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def _projections(self, bias: bool) -> None:
        self.q = nn.Linear(self.dim, self.dim, bias=bias)
        self.kv = nn.Linear(self.dim, 2 * self.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        grid, pool = (x.shape[1], x.shape[2]), self.pool(x.shape[1], x.shape[2])
        rows, columns = (self._neighbours(side, x) for side in grid)
        length = (rows[:, None] * columns).flatten() + pool[0] * pool[1]
        unscaled, q = self._queries(split_heads(self.q(x.flatten(1, 2)), self.num_heads), length.log()[:, None])
        k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self.kv(x).chunk(2, -1))
        local = self._local(q, F.normalize(k, dim=-1), v, grid)
        pooled = F.adaptive_avg_pool2d(F.gelu(self.sr(x)).movedim(-1, 1), pool).flatten(2).mT
        kp, vp = (split_heads(t, self.num_heads) for t in self.kv(self.norm(pooled)).chunk(2, -1))
        bias = self.position_bias(grid, pool)
        # the bias is there for every pair, so nothing is gained by not making the scores
        kp = F.normalize(kp, dim=-1)
        far = attention(q, kp, vp, bias=bias, scale=1.0, backend="reference", return_lse=True)
        y = merge(local, far).out + self._learned(unscaled, v, grid)
        return self._out(y, x)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Partial:
        axes = [Axis(side, self.window_size, border="cut") for side in grid]
        bias = self.relative_pos_bias_local.unflatten(-1, (self.window_size, -1))
        on_grid = q.transpose(1, 2).unflatten(1, grid)
        center = [self.window_size // 2] * 2
        out, lse = grid_attention(on_grid, k, v, axes, bias=bias, bias_center=center, scale=1.0)
        return Partial(out.flatten(1, 2).transpose(1, 2), lse.flatten(1, 2).transpose(1, 2))

    def _learned(self, q: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """``Σ_o (q̂ T + b_T)_o v_{i+o}``, zero beyond the borders; (B, heads, N, D)."""
        weights = (q @ self.learnable_tokens + self.learnable_bias).transpose(1, 2).unflatten(1, grid)
        radius = self.window_size // 2
        axes = [Axis(side, self.window_size, border="pad") for side in grid]
        y = slot_sum(weights, F.pad(v, (0, 0, 0, 0, radius, radius, radius, radius)), axes)
        return y.flatten(1, 2).transpose(1, 2)

    def _neighbours(self, side: int, x: Tensor) -> Tensor:
        """How many tokens of a line each token's window holds."""
        place, radius = torch.arange(side, device=x.device), self.window_size // 2
        return ((place + radius).clamp(max=side - 1) - (place - radius).clamp(min=0) + 1).to(x.dtype)

    def pool(self, height: int, width: int) -> tuple[int, int]:
        """Sides of the pooled grid.

        Raises:
            ShapeError: the grid is too small for it.
        """
        if self.pool_size is not None:
            if min(height, width) <= self.pool_size:
                raise ShapeError(f"x: expected sides above pool_size {self.pool_size}, got {height} x {width} tokens")
            return self.pool_size, self.pool_size
        if min(height, width) < self.sr_ratio:
            raise ShapeError(f"x: expected sides of at least sr_ratio {self.sr_ratio}, got {height} x {width} tokens")
        return height // self.sr_ratio, width // self.sr_ratio

    @classmethod
    def from_official(  # type: ignore[override]
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        input_resolution: Sequence[int],
        num_heads: int = 8,
        window_size: int = 3,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        fixed_pool_size: int | None = None,
        pretrain_grid: Sequence[int] | None = None,
        further: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> "AggregatedAttention":
        """Weights of the published ``AggregatedAttention``; ``pretrain_grid`` is what its table was made with."""
        grid = pretrain_grid or input_resolution
        module = cls(dim, num_heads, grid, window_size, sr_ratio, fixed_pool_size, qkv_bias, **(further or {}))
        load_strictly(module, state_dict, _CPB)
        return module


@torch.compiler.assume_constant_result
def _coordinates(height: int, width: int, rows: int, columns: int, *pretrain: int) -> tuple[Tensor, Tensor]:
    """The different distances (U, 2), on a logarithmic scale, and which of them holds for tokens and cells (N, P)."""
    (down, i), (right, j) = (_distances(*each) for each in ((height, rows, pretrain[0]), (width, columns, pretrain[1])))
    table = np.stack(np.meshgrid(down, right, indexing="ij"), -1).reshape(-1, 2)
    index = i[:, None, :, None] * len(right) + j[None, :, None, :]
    return torch.as_tensor(table, dtype=torch.float32), torch.as_tensor(index.reshape(height * width, rows * columns))


@lru_cache(maxsize=256)
def _distances(length: int, cells: int, pretrain: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distances of ``length`` tokens to the centres of ``cells``, which overlap where they do not divide the length."""
    first = np.arange(cells) * length // cells
    last = -(-(np.arange(cells) + 1) * length // cells) - 1
    relative = (2 * np.arange(length)[:, None] - first - last) / 2 / (pretrain - 1) * 8
    values, index = np.unique(relative, return_inverse=True)
    return np.sign(values) * np.log2(np.abs(values) + 1) / 3, index.reshape(relative.shape)
