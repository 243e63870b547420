"""`Mask`: which keys a query may see, as an immutable value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from regard.masks.blocks import BlockStructure

Index = Tensor | int


class Mask(ABC):
    """Which keys a query may see.

    A mask is an immutable value: calling it is its definition, `rect` is what makes it cheap at any length, and `&`,
    `|`, `~` build new masks. Its signature is FlexAttention's ``mask_mod``, so it also works there as it is.

    A new leaf implements `__call__` and `rect`; everything else follows from the two.
    """

    heads: int | None = None
    """Number of heads the mask distinguishes, or None when all heads see the same."""

    batch: int | None = None
    """Number of batch items the mask distinguishes, or None when all see the same."""

    lengths: tuple[int | None, int | None] = (None, None)
    """Query and key length the mask was made for; None where it fits any."""

    exact: bool = True
    """Whether `rect` is exact. Combinations are only sound: they may answer "some, not all" out of caution."""

    relative: bool = False
    """Whether the answer depends on ``q - k`` alone."""

    settles: bool = False
    """Whether `settled` may ever answer True, i.e. is worth asking."""

    @abstractmethod
    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        """Whether query ``q_idx`` may see key ``k_idx``.

        Args:
            b, h: batch item and head, integers or integer tensors.
            q_idx, k_idx: integer tensors that broadcast with each other (and with ``b``, ``h`` if those are tensors).

        Returns:
            A bool tensor that broadcasts to the common shape of the arguments. It may be smaller: what does not depend
            on the query, say, keeps the shape of ``k_idx``.
        """

    @abstractmethod
    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        """For rectangles ``q0 <= q < q1``, ``k0 <= k < k1``: is some pair allowed, are all pairs allowed?

        Args:
            q0, q1, k0, k1: int64 tensors of shape (R,), every rectangle non-empty and inside the mask's lengths.

        Returns:
            ``(some, all)``, bool tensors that broadcast to (batch or 1, heads or 1, R). ``some=False`` means that
            nothing there is allowed and ``all=True`` that everything is; for an `exact` mask the converses hold too.
        """

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Whether `rect` would answer "some, not all" for *every* sub-rectangle of at least ``height`` x ``width``.

        It lets the block builder stop early in patterns that are mixed everywhere, such as `strided`. Answering False
        is always right, only slower.
        """
        return torch.zeros_like(q0, dtype=torch.bool)

    def count(self, n: int, m: int) -> int | None:
        """Number of allowed pairs if there is a direct way to count them, summed over batch and heads; else None."""
        return None

    def check(self, n: int, m: int, offset: int | None = None) -> None:
        """Raise `ShapeError` if the mask was made for other lengths.

        Args:
            n, m: number of queries and keys.
            offset: position of the first query when the mask is seen through `shift`. Such a view may cover a part of
                the mask's lengths; without an offset they must be equal.
        """
        own = self.lengths
        if own == (None, None):
            return
        if offset is None:
            fits = own[0] in (None, n) and own[1] in (None, m)
            used = f"n={n} queries and m={m} keys"
        else:
            fits = (own[0] is None or 0 <= offset <= own[0] - n) and (own[1] is None or m <= own[1])
            used = f"queries {offset} to {offset + n} and m={m} keys"
        if not fits:
            made = " and ".join(f"{name}={size}" for name, size in zip("nm", own, strict=True) if size is not None)
            raise ShapeError(f"mask {self!r} was made for {made}; it was used with {used}")

    # -- algebra ------------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        """Pairs that both masks allow."""
        from regard.masks.combine import conjunction

        return conjunction(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        """Pairs that either mask allows."""
        from regard.masks.combine import disjunction

        return disjunction(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        """Pairs that the mask does not allow."""
        from regard.masks.combine import negation

        return negation(self)

    def shift(self, offset: int) -> Mask:
        """A view in which query index ``i`` means position ``i + offset``.

        For decoding ``n`` new tokens against ``m`` cached ones: ``mask.shift(m - n)``.
        """
        from regard.masks.combine import shifted

        return shifted(self, offset)

    # -- views of it --------------------------------------------------------------------------------------------------

    def blocks(
        self, n: int, m: int | None = None, block_size: int | tuple[int, int] = 128, *, exact: bool = False
    ) -> BlockStructure:
        """Which blocks of the (n, m) score matrix are visited, and which of them need the pointwise mask.

        Coarse rectangles are asked first and only mixed ones are refined; no tensor of size n x m is ever made. The
        structure takes nine bytes per run of key blocks, so what costs is a pattern with very many runs per row, such
        as a stride of several blocks over the whole length.

        Args:
            n, m: number of queries and keys (``m`` defaults to ``n``).
            block_size: tokens per block, one number or (queries, keys).
            exact: decide the blocks for which a combination can only say "some" by evaluating their pairs. Without
                it the structure of a combination is sound but may list a block that turns out empty or full.
        """
        from regard.masks.build import build

        n, m = self._lengths(n, m)
        return build(self, n, m, block_size, exact=exact)

    def dense(self, n: int, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The whole matrix, bool: (n, m), or (heads, n, m), or (batch, heads or 1, n, m) where the mask needs it."""
        n, m = self._lengths(n, m)
        own = self if device is None else self.to(device)
        q, k = torch.arange(n, device=device)[:, None], torch.arange(m, device=device)
        shape: tuple[int, ...] = (n, m)
        b: Index = 0
        h: Index = 0
        if self.heads or self.batch:
            h = torch.arange(self.heads or 1, device=device)[:, None, None]
            shape = (self.heads or 1, *shape)
        if self.batch:
            b = torch.arange(self.batch, device=device)[:, None, None, None]
            shape = (self.batch, *shape)
        return own(b, h, q, k).broadcast_to(shape).contiguous()

    def density(self, n: int, m: int | None = None) -> float:
        """The exact share of the n x m pairs that are allowed, averaged over batch and heads."""
        from regard.masks.analysis import density

        n, m = self._lengths(n, m)
        return density(self, n, m)

    def receptive_field(self, layers: int, n: int) -> Tensor:
        """Which positions can influence a position through ``layers`` layers of attention with this mask.

        A layer passes a position's own value on (the residual connection) and mixes heads and what a batch item sees
        in any of them. Costs time proportional to layers x allowed pairs x n / 64.

        Returns:
            Bool tensor (n, n), or (batch, n, n): entry ``[i, j]`` says whether ``j`` reaches ``i``.
        """
        from regard.masks.analysis import receptive_field

        self._lengths(n, n)
        return receptive_field(self, layers, n)

    def min_layers(self, n: int) -> int | None:
        """The least number of layers after which every position has heard from all positions.

        For a mask that is causal at this length that means from all earlier ones. None if no number of layers is
        enough. See `receptive_field`.
        """
        from regard.masks.analysis import min_layers

        self._lengths(n, n)
        return min_layers(self, n)

    def to_flex(
        self,
        n: int,
        m: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask as FlexAttention's ``BlockMask``, built from `blocks` instead of from the n x m matrix."""
        from regard.masks.flex import to_flex

        n, m = self._lengths(n, m)
        return to_flex(self, n, m, block_size, device)

    def plot(self, n: int, m: int | None = None, *, batch: int = 0, head: int = 0) -> Any:
        """A plotly figure: the pairs themselves when the matrix is small, else its blocks (none, some, all)."""
        from regard.masks.plot import plot

        n, m = self._lengths(n, m)
        return plot(self, n, m, batch, head)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with the tensors it holds on ``device``."""
        changes: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]  # every concrete mask is a dataclass
            value = getattr(self, field.name)
            if not field.init:
                continue
            if isinstance(value, Tensor | Mask):
                changes[field.name] = value.to(device)
            elif isinstance(value, tuple) and value and isinstance(value[0], Mask):
                changes[field.name] = tuple(part.to(device) for part in value)
        return replace(self, **changes) if changes else self  # type: ignore[type-var]

    def _lengths(self, n: int, m: int | None) -> tuple[int, int]:
        m = n if m is None else m
        for name, size in (("n", n), ("m", m)):
            if size < 1:
                raise ArgumentError(f"{name} must be at least 1, got {size}")
        self.check(n, m)
        return n, m
