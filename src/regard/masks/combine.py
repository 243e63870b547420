"""Masks made of masks: `&`, `|`, `~`, the shifted view, and one mask per head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.masks.base import Index, Mask
from regard.masks.sequence import Band, Empty


@dataclass(frozen=True, repr=False)
class Nary(Mask):
    """What `And` and `Or` share: two or more parts that agree on their batch and heads."""

    parts: tuple[Mask, ...]

    exact = False

    def __post_init__(self) -> None:
        _common("heads", self.parts)
        _common("batch", self.parts)

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return _common("heads", self.parts)

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return _common("batch", self.parts)

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return all(part.relative for part in self.parts)

    @property
    def settles(self) -> bool:  # type: ignore[override]
        return any(part.settles for part in self.parts)

    def check(self, n: int, m: int, offset: int | None = None) -> None:
        for part in self.parts:
            part.check(n, m, offset)


class And(Nary):
    """Pairs that every part allows."""

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return reduce(torch.Tensor.__and__, (part(b, h, q_idx, k_idx) for part in self.parts))

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some, every = zip(*(part.rect(q0, q1, k0, k1) for part in self.parts), strict=True)
        return reduce(torch.Tensor.__and__, some), reduce(torch.Tensor.__and__, every)

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        mixed, every = zip(*_settled_parts(self.parts, 1, q0, q1, k0, k1, height, width), strict=True)
        held = reduce(torch.Tensor.__and__, (m | e for m, e in zip(mixed, every, strict=True)))
        return held & reduce(torch.Tensor.__or__, mixed)

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts)


class Or(Nary):
    """Pairs that at least one part allows."""

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return reduce(torch.Tensor.__or__, (part(b, h, q_idx, k_idx) for part in self.parts))

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some, every = zip(*(part.rect(q0, q1, k0, k1) for part in self.parts), strict=True)
        return reduce(torch.Tensor.__or__, some), reduce(torch.Tensor.__or__, every)

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        mixed, some = zip(*_settled_parts(self.parts, 0, q0, q1, k0, k1, height, width), strict=True)
        held = reduce(torch.Tensor.__and__, (m | ~s for m, s in zip(mixed, some, strict=True)))
        return held & reduce(torch.Tensor.__or__, mixed)

    def __repr__(self) -> str:
        return " | ".join(f"({part!r})" if isinstance(part, And) else repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Wrapped(Mask):
    """What `Not` and `Shift` share: everything but the answer is the inner mask's."""

    mask: Mask

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return self.mask.heads

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return self.mask.batch

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.mask.exact

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.mask.relative

    @property
    def settles(self) -> bool:  # type: ignore[override]
        return self.mask.settles

    def check(self, n: int, m: int, offset: int | None = None) -> None:
        self.mask.check(n, m, offset)


class Not(Wrapped):
    """Pairs that the mask does not allow."""

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return ~self.mask(b, h, q_idx, k_idx)

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some, every = self.mask.rect(q0, q1, k0, k1)
        return ~every, ~some

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        return self.mask.settled(q0, q1, k0, k1, height, width)

    def count(self, n: int, m: int) -> int | None:
        inner = self.mask.count(n, m)
        return None if inner is None else n * m * (self.batch or 1) * (self.heads or 1) - inner

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, Nary) else f"~{self.mask!r}"


@dataclass(frozen=True, repr=False)
class Shift(Wrapped):
    """The mask with query index ``i`` standing for position ``i + offset``."""

    offset: int

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return self.mask(b, h, q_idx + self.offset, k_idx)

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        return self.mask.rect(q0 + self.offset, q1 + self.offset, k0, k1)

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        return self.mask.settled(q0 + self.offset, q1 + self.offset, k0, k1, height, width)

    def check(self, n: int, m: int, offset: int | None = None) -> None:
        self.mask.check(n, m, self.offset + (offset or 0))

    def __repr__(self) -> str:
        inner = f"({self.mask!r})" if isinstance(self.mask, Nary | Not) else repr(self.mask)
        return f"{inner}.shift({self.offset})"


@dataclass(frozen=True, repr=False)
class PerHead(Mask):
    """Head ``h`` uses ``masks[h]``."""

    masks: tuple[Mask, ...]

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return len(self.masks)

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return _common("batch", self.masks)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(mask.exact for mask in self.masks)

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return False

    @property
    def settles(self) -> bool:  # type: ignore[override]
        return any(mask.settles for mask in self.masks)

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        # every mask is evaluated and one is kept, so that the choice may be traced
        chosen = ((h == head) & mask(b, h, q_idx, k_idx) for head, mask in enumerate(self.masks))
        return reduce(torch.Tensor.__or__, chosen)

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some, every = zip(*(mask.rect(q0, q1, k0, k1) for mask in self.masks), strict=True)
        return self._stack(some, len(q0)), self._stack(every, len(q0))

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        return self._stack([mask.settled(q0, q1, k0, k1, height, width) for mask in self.masks], len(q0))

    def check(self, n: int, m: int, offset: int | None = None) -> None:
        for mask in self.masks:
            mask.check(n, m, offset)

    def __repr__(self) -> str:
        return f"per_head({list(self.masks)!r})"

    def _stack(self, answers: Iterable[Tensor], rectangles: int) -> Tensor:
        return torch.cat([answer.broadcast_to(self.batch or 1, 1, rectangles) for answer in answers], dim=1)


def per_head(masks: Sequence[Mask]) -> Mask:
    """One mask per head, none of which may itself distinguish heads."""
    if not masks:
        raise ArgumentError("masks must hold one mask per head, got none")
    for head, mask in enumerate(masks):
        if mask.heads is not None:
            raise ShapeError(f"masks[{head}] must not distinguish heads, it is made for {mask.heads}: {mask!r}")
    _common("batch", tuple(masks))
    return PerHead(tuple(masks))


def conjunction(*masks: Mask) -> Mask:
    """All of the masks: flattened, neutral parts dropped, and bands of differences joined into one band."""
    band: Band | None = Band()
    parts: dict[Mask, None] = {}  # an ordered set
    for part in chain.from_iterable(m.parts if isinstance(m, And) else (m,) for m in masks):
        if isinstance(part, Band) and band is not None:
            band = band.intersect(part)
        elif isinstance(part, Empty):
            band = None
        else:
            parts[part] = None
    if band is None:
        return Empty()
    kept = ([] if band == Band() and parts else [band]) + list(parts)
    return kept[0] if len(kept) == 1 else And(tuple(kept))


def disjunction(*masks: Mask) -> Mask:
    """Any of the masks: flattened, neutral parts dropped."""
    parts = list(dict.fromkeys(chain.from_iterable(m.parts if isinstance(m, Or) else (m,) for m in masks)))
    if Band() in parts:
        return Band()
    parts = [part for part in parts if not isinstance(part, Empty)] or [Empty()]
    return parts[0] if len(parts) == 1 else Or(tuple(parts))


def negation(mask: Mask) -> Mask:
    """What the mask does not allow."""
    if isinstance(mask, Not):
        return mask.mask
    if isinstance(mask, Empty):
        return Band()
    return Empty() if mask == Band() else Not(mask)


def shifted(mask: Mask, offset: int) -> Mask:
    """The mask as seen by queries that start at position ``offset``."""
    if isinstance(mask, Band):
        return mask.moved(offset)
    return Shift(mask.mask, mask.offset + offset) if isinstance(mask, Shift) else Shift(mask, offset)


def _settled_parts(parts: tuple[Mask, ...], which: int, *rectangle: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per part, where it is settled, and its ``rect`` answer number ``which``."""
    return [(part.settled(*rectangle), part.rect(*rectangle[:4])[which]) for part in parts]


def _common(name: str, masks: tuple[Mask, ...]) -> int | None:
    """The size the masks share in ``heads`` or ``batch``; None if none of them has one."""
    sizes = {getattr(mask, name) for mask in masks} - {None}
    if len(sizes) > 1:
        each = "; ".join(f"{getattr(mask, name)} in {mask!r}" for mask in masks if getattr(mask, name) is not None)
        raise ShapeError(f"masks that are combined must agree on {name}, got {each}")
    return sizes.pop() if sizes else None
