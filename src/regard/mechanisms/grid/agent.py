"""Agent attention on grids, as Agent-PVT has it for the whole image and Agent-Swin for windows of any size."""

from collections.abc import Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.layers.relative_position import window_shape
from regard.mechanisms.grid.base import GridMechanism
from regard.mechanisms.linear.agent import AgentAttention


class GridAgentAttention(GridMechanism):
    """Agent attention (arXiv:2312.08874) on (B, H, W, C): `AgentAttention` of the whole grid, or of each window.

    Agents are pooled from their own window. With ``shift`` the grid is rolled first and back afterwards, and tokens
    that the roll brings together do see each other, as published: agents stand for them all. Exact; noncausal.

    Args:
        dim, num_heads, num_agents, kv_reduction, kernel_size: as in `AgentAttention`.
        window_size: height and width of the windows, or the side of square ones; must divide H and W. Its learned
            biases have this size.
        qkv_bias: of the query, key and value projections.
        shift: by how much the grid is rolled up and to the left.
    """

    cost: ClassVar[str] = "O(N C² + N n C), n agents"
    example: ClassVar[dict[str, Any]] = {"window_size": 14}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        num_agents: int = 49,
        kv_reduction: int = 1,
        qkv_bias: bool = True,
        kernel_size: int = 3,
        shift: int = 0,
    ):
        super().__init__()
        sides = (window_size,) * 2 if isinstance(window_size, int) else window_shape(window_size)
        if len(sides) != 2:
            raise ArgumentError(f"window_size: expected one number or (height, width), got {window_size}")
        height, width = sides
        self.dim, self.window_size, self.shift = dim, (height, width), shift
        self.agent = AgentAttention(
            dim,
            num_heads,
            num_agents,
            (height, width),
            kv_reduction=kv_reduction,
            bias=qkv_bias,
            kernel_size=kernel_size,
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.window_size
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] % height or x.shape[2] % width:
            sides = f"multiples of {height} and {width}"
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), H and W {sides}, got {tuple(x.shape)}")
        rolled = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        cut = rearrange(rolled, "b (h p) (w q) c -> (b h w) (p q) c", p=height, q=width)
        h, w = x.shape[1] // height, x.shape[2] // width
        y = rearrange(self.agent(cut), "(b h w) (p q) c -> b (h p) (w q) c", h=h, w=w, p=height)
        return y.roll((self.shift, self.shift), (1, 2)) if self.shift else y
