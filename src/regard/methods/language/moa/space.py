"""The rules a head may be given: spans that grow linearly with the length, and what each costs and loses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class ElasticSpace:
    """Candidate rules ``span(N) = alpha + beta · N`` (arXiv:2406.14909), as patterns over blocks of tokens.

    At length N a rule keeps, of nb = N / b blocks of keys, block 0 (the sink) and those within ``band`` blocks of the
    query's own:

        band = int(alpha // b + beta · nb)        row I keeps {0} and I - max(band, 1) + 1 .. I

    Args:
        alphas: fixed part of each rule in tokens; may be negative.
        betas: share of the length of each rule.
        block_size: b.
    """

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    block_size: int = 64

    def __post_init__(self) -> None:
        if len(self.alphas) != len(self.betas) or not self.alphas:
            raise ArgumentError(
                f"alphas and betas must be equally many, at least one, got {len(self.alphas)} and {len(self.betas)}"
            )
        if self.block_size < 1:
            raise ArgumentError(f"block_size must be at least 1, got {self.block_size}")

    @classmethod
    def grid(
        cls,
        alpha: Sequence[float] | Tensor,
        beta: Sequence[float] | Tensor,
        *,
        min_length: int,
        max_profile: int,
        max_length: int,
        block_size: int = 64,
    ) -> "ElasticSpace":
        """All pairs of an alpha and a beta that make sense at the lengths in use, by their span at ``max_length``.

            alpha + beta · L <= L for L = max_profile and L = max_length        alpha + beta · min_length > 0

        Args:
            alpha, beta: the values to combine.
            min_length, max_length: least and greatest length in use.
            max_profile: greatest length that was profiled.
        """
        first, second = (torch.as_tensor(x, dtype=torch.float32).flatten() for x in (alpha, beta))
        a, b = first.repeat_interleave(len(second)), second.repeat(len(first))
        fits = (a + b * max_profile <= max_profile) & (a + b * max_length <= max_length) & (a + b * min_length > 0)
        if not fits.any():
            raise ArgumentError(f"alpha, beta: none of {len(a)} pairs is a span at lengths {min_length}..{max_length}")
        a, b = a[fits], b[fits]
        order = torch.sort(a + b * max_length, stable=True).indices
        return cls(tuple(a[order].tolist()), tuple(b[order].tolist()), block_size)

    @classmethod
    def default(
        cls, profiled: Sequence[int], other: Sequence[int] = (), *, interval: int = 1024, block_size: int = 64
    ) -> "ElasticSpace":
        """The published grid: an alpha every ``interval`` tokens or so, nine betas from 0 to 1.

        Args:
            profiled: lengths at which the influence was taken.
            other: further lengths at which the plan will be used.
        """
        if not profiled:
            raise ArgumentError("profiled must name at least one length, got none")
        least, most = min(*profiled, *other, max(profiled)), max(*profiled, *other, max(profiled))
        alpha = torch.linspace(-least, max(profiled), (max(profiled) + least) // interval + 1)
        return cls.grid(
            alpha,
            torch.linspace(0, 1, 9),
            min_length=least,
            max_profile=max(profiled),
            max_length=most,
            block_size=block_size,
        )

    def __len__(self) -> int:
        return len(self.alphas)

    def layouts(self, length: int) -> Tensor:
        """(rules, nb, nb) bool: the blocks each rule keeps at ``length`` tokens."""
        size = self._blocks(length)
        index = torch.arange(size)
        gap = index[:, None] - index
        bands = torch.tensor(
            [
                max(int(alpha // self.block_size + beta * size), 1)
                for alpha, beta in zip(self.alphas, self.betas, strict=True)
            ]
        )
        return (gap >= 0) & ((gap < bands[:, None, None]) | (index == 0))

    def loss(self, importance: Tensor) -> Tensor:
        """(..., rules): the influence that each rule removes, of ``importance`` (..., nb, nb) summed over blocks."""
        if importance.ndim < 2 or importance.shape[-1] != importance.shape[-2]:
            raise ShapeError(f"importance: expected (..., blocks, blocks), got {tuple(importance.shape)}")
        kept = self.layouts(importance.shape[-1] * self.block_size).to(importance.device)
        return torch.stack([(importance * dropped).sum((-2, -1)) for dropped in (~kept).tril()], dim=-1)

    def cost(self, length: int) -> Tensor:
        """(rules,) tokens a head must hold at ``length``: the most blocks that any row keeps."""
        size = self._blocks(length)
        return self.layouts(length).sum(-1).amax(-1) / size * length

    def _blocks(self, length: int) -> int:
        if length < self.block_size:
            raise ArgumentError(f"length must be at least one block of {self.block_size}, got {length}")
        return length // self.block_size
