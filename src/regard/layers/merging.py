"""Merging similar tokens of an image and undoing it."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


class GridMerge(NamedTuple):
    """Which tokens of a grid are merged into which: bipartite soft matching (ToMe, arXiv:2210.09461, 2303.17604).

    Attributes:
        destinations: (K,) indices of the tokens that others are merged into, one per cell.
        sources: (B, N - K) indices of all other tokens, those most similar to a destination first.
        target: (B, N - K) which destination each source is most similar to, 0 .. K - 1.
    """

    destinations: Tensor
    sources: Tensor
    target: Tensor

    @classmethod
    def match(
        cls, x: Tensor, grid: tuple[int, int], cell: tuple[int, int], offset: Tensor | None = None
    ) -> "GridMerge":
        """Match the tokens x (B, H W, C) by cosine similarity.

        Args:
            x: the tokens, row by row.
            grid: (H, W).
            cell: height and width of the cells that have one destination each; what is left at the edges has none.
            offset: (H // height, W // width) which token of each cell, its first by default.

        Raises:
            ShapeError, ArgumentError: tokens, grid and cells do not fit.
        """
        (height, width), (down, right) = grid, cell
        if x.dim() != 3 or x.shape[1] != height * width:
            raise ShapeError(f"x: expected (B, {height * width}, C), got {tuple(x.shape)}")
        if not (0 < down <= height and 0 < right <= width):
            raise ArgumentError(f"cell: expected at most {height} x {width}, got {down} x {right}")
        if offset is None:
            offset = torch.zeros(height // down, width // right, dtype=torch.long, device=x.device)
        rows = torch.arange(height // down, device=x.device)[:, None] * down + offset // right
        columns = torch.arange(width // right, device=x.device) * right + offset % right
        destinations = (rows * width + columns).flatten()
        other = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        other[destinations] = False
        sources = other.nonzero().squeeze(-1)
        unit = x / x.norm(dim=-1, keepdim=True)
        best, target = (unit[:, sources] @ unit[:, destinations].mT).max(-1)
        order = best.argsort(-1, descending=True)
        return cls(destinations, sources[order], target.gather(1, order))

    def merge(self, x: Tensor, count: int) -> Tensor:
        """x (B, N, C) with its ``count`` most similar sources averaged into their destinations: (B, N - count, C)."""
        count = min(count, self.sources.shape[1])
        moved, kept = self._take(x, self.sources[:, :count]), self._take(x, self.sources[:, count:])
        index = self.target[:, :count, None].expand(-1, -1, x.shape[-1])
        into = x[:, self.destinations].scatter_reduce(1, index, moved, reduce="mean")
        return torch.cat([kept, into], 1)

    def unmerge(self, x: Tensor, count: int) -> Tensor:
        """The inverse on places: (B, N - count, C) to (B, N, C), merged tokens get what their destination has."""
        count = min(count, self.sources.shape[1])
        left = self.sources.shape[1] - count
        kept, into = x[:, :left], x[:, left:]
        out = x.new_zeros(x.shape[0], x.shape[1] + count, x.shape[2])
        out[:, self.destinations] = into
        moved = self._take(into, self.target[:, :count])
        index = self.sources.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return out.scatter(1, index, torch.cat([moved, kept], 1))

    @staticmethod
    def _take(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
