"""Multi-axis attention (MaxViT): attention inside windows, and inside groups spread evenly over the whole grid."""

from collections.abc import Sequence
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.layers.relative_position import RelativePositionBias, window_shape
from regard.masks import Mask
from regard.mechanisms.grid.base import GridMechanism


def block_mask(grid: Sequence[int], window_size: int | Sequence[int]) -> Mask:
    """Which tokens of a grid see each other in `BlockAttention`: those with equal y // P and x // P."""
    shape = window_shape(window_size)
    _divides("window_size", shape, grid)
    return masks.windows(grid, shape)


def grid_mask(grid: Sequence[int], grid_size: int | Sequence[int]) -> Mask:
    """Which tokens of a grid see each other in `GridAttention`: those with equal y % (H / G) and x % (W / G)."""
    shape = window_shape(grid_size, "grid_size")
    _divides("grid_size", shape, grid)
    return masks.product(grid, [masks.strided(side // cells) for side, cells in zip(grid, shape, strict=True)])


class PartitionAttention(GridMechanism):
    """Softmax attention inside groups of equally many tokens, with a bias for relative positions in the group.

        y = Wo softmax(q kᵀ / √D + bias) v        per group and head

    What a group is, a subclass says: `BlockAttention` takes neighbours, `GridAttention` tokens far apart.
    """

    cost: ClassVar[str] = "O(N P² C), with groups of P² of the N = H W tokens"
    #: how the grid falls apart into groups (h, w) of tokens (p, q)
    tokens: ClassVar[str]
    argument: ClassVar[str]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: int | Sequence[int],
        qkv_bias: bool,
        proj_bias: bool,
        relative_bias: bool,
        projections: int = 3,
    ):
        super().__init__()
        per_head(dim, num_heads)
        self.dim, self.num_heads, self.size = dim, num_heads, window_shape(size, self.argument)
        if len(self.size) != 2:
            raise ArgumentError(f"{self.argument}: expected one number or (height, width), got {size}")
        self.qkv = nn.Linear(dim, projections * dim, bias=qkv_bias)
        self.rel_pos = RelativePositionBias(self.size, num_heads) if relative_bias else None
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        query, key, value = self._heads(x)
        return self._mix(query, key, value, x)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        _divides(self.argument, self.size, x.shape[1:3])

    def _heads(self, x: Tensor) -> list[Tensor]:
        """What is projected from each group, (B · groups, heads, tokens, D)."""
        p, q = self.size
        groups = rearrange(x, f"b {self.tokens} c -> (b h w) (p q) c", p=p, q=q)
        return [split_heads(t, self.num_heads) for t in self.qkv(groups).split(self.dim, -1)]

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> Tensor:
        bias = None if self.rel_pos is None else self.rel_pos()[None]
        y = self.proj(merge_heads(attention(query, key, value, bias=bias)))
        (p, q), (h, w) = self.size, (x.shape[1] // self.size[0], x.shape[2] // self.size[1])
        return rearrange(y, f"(b h w) (p q) c -> b {self.tokens} c", p=p, q=q, h=h, w=w)


class BlockAttention(PartitionAttention):
    """Attention inside windows of P × P neighbours: the local half of multi-axis attention (MaxViT, arXiv:2204.01697).

        y = Wo softmax(q kᵀ / √D + bias) v        for tokens with equal y // P and x // P

    x (B, H, W, C) to the same; `block_mask` is the pattern. Exact, noncausal.

    Args:
        dim: C.
        num_heads: heads.
        window_size: P, or (height, width); must divide H and W.
        qkv_bias, proj_bias: whether the projections have biases.
        relative_bias: whether scores get a learned number per offset and head.

    Raises:
        ShapeError: the windows do not divide the grid.
    """

    tokens: ClassVar[str] = "(h p) (w q)"
    argument: ClassVar[str] = "window_size"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        relative_bias: bool = True,
    ):
        super().__init__(dim, num_heads, window_size, qkv_bias, proj_bias, relative_bias)


class GridAttention(PartitionAttention):
    """Attention between G × G tokens spread over the grid: the global half of multi-axis attention (arXiv:2204.01697).

        y = Wo softmax(q kᵀ / √D + bias) v        for tokens with equal y % (H / G) and x % (W / G)

    x (B, H, W, C) to the same; `grid_mask` is the pattern. As many keys per query as `BlockAttention` has, H / G and
    W / G apart; offsets in the bias count these steps. After both, every token depends on every other if H ≤ P G and
    W ≤ P G. Exact, noncausal.

    Args:
        dim: C.
        num_heads: heads.
        grid_size: G, or (rows, columns); must divide H and W.
        qkv_bias, proj_bias: whether the projections have biases.
        relative_bias: whether scores get a learned number per offset and head.

    Raises:
        ShapeError: the grid size does not divide the grid.
    """

    tokens: ClassVar[str] = "(p h) (q w)"
    argument: ClassVar[str] = "grid_size"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        relative_bias: bool = True,
    ):
        super().__init__(dim, num_heads, grid_size, qkv_bias, proj_bias, relative_bias)


def _divides(argument: str, shape: Sequence[int], grid: Sequence[int]) -> None:
    if len(shape) != len(grid) or any(side % cells for side, cells in zip(grid, shape, strict=True)):
        raise ShapeError(f"{argument}: {tuple(shape)} does not divide the grid {tuple(grid)}")
