"""`inspect`: where a language model looks in one text, by layer, head and token, as a page to click through."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.sites import apply
from regard.study import subject
from regard.study.inspect_weights import Plan, Reduced, Reducer
from regard.study.inspected import Inspected
from regard.study.reading import Reader
from regard.tasks.text import opening, tokenize

LONGEST = 4096  # tokens; a page of more is neither small nor readable
_BINS, _SPANS, _TOP = 48, 12, 16
_PATTERN_BYTES, _TOP_BYTES = 2 * 2**20, 3 * 2**20  # of the page, before base64

#: what a head does for the most part, in the order in which it is decided
ROLES = {
    "itself": "half of its attention or more stays on the token itself",
    "previous token": "40% or more goes to the token just before",
    "repetition": "where the token occurred before, 30% or more goes to what followed it then",
    "first token": "60% or more goes to the first token, which usually means: nothing found",
    "nearby": "60% or more stays within 7 tokens",
    "broad": "its entropy is 70% or more of the highest possible",
    "mixed": "none of these",
}


@dataclass(frozen=True)
class Unit:
    """A head, or the mean over the heads of a layer (head None): means over the text's tokens as queries.

    Attributes:
        entropy: of the weights, in nats.
        distance: tokens between query and key.
        first: share on the first token.
        repetition: share on what followed earlier occurrences of the query's token, where there are any.
        role: one of `ROLES`; none for a mean.
    """

    layer: int
    head: int | None
    entropy: float
    distance: float
    first: float
    repetition: float
    role: str | None


@dataclass(frozen=True, eq=False)
class Inspection(Inspected):
    """What `inspect` returns.

    Attributes:
        model, source: where model and text come from.
        tokens: the text's tokens as they read.
        cut: the text went on after them.
        causal: no token looks at a later one.
        units: the heads of every layer, and after those its mean.
        edges: bin b of `patterns` holds positions edges[b] <= p < edges[b + 1].
        patterns: (units, bins, bins), mean attention of the queries of a bin to all keys of a bin.
        spans: edges of the pieces of text that `flow` is about.
        flow: (units, S, S), the same between those pieces.
        received: (units, N), mean share a token got from the queries that may see it.
        top, shares: (layers, N, K), the keys each query attends to most, mean over heads, and how much.
    """

    model: str
    source: str
    tokens: list[str]
    cut: bool
    causal: bool
    units: list[Unit]
    edges: tuple[int, ...]
    patterns: Tensor
    spans: tuple[int, ...]
    flow: Tensor
    received: Tensor
    top: Tensor
    shares: Tensor

    ROLES: ClassVar[Mapping[str, str]] = ROLES


def inspect(
    model: str | Path | tuple[nn.Module, Any] = "smollm2",
    *,
    text: str | Path | None = None,
    tokens: int = 512,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Run a language model once over a text and keep where it looked.

        from regard.study.inspect import inspect
        inspect("smollm2", text=Path("letter.txt")).report("inspect.html")

    Args:
        model: a name or path as `regard.study.models.load` takes it, or a loaded (model, tokenizer).
        text: the text itself, or the `Path` of a file; English prose from Python's manual if None.
        tokens: the first so many are read, at most 4096.
        device, dtype: where and as what to load the model; a model that is loaded stays as it is.
        on_progress: called with layers done and their number.

    Raises:
        ArgumentError: an unknown model, text that cannot be read, or more tokens than the model or a page holds.
        Unsupported: attention that cannot be reached.
        MissingExtra: an optional package is needed and not there.
    """
    if not 2 <= tokens <= LONGEST:
        raise ArgumentError(f"tokens must be 2 to {LONGEST}, got {tokens}")
    source, content = subject.source(text)
    network, tokenizer = subject.network(model, device, dtype)
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ArgumentError(f"tokens: the model reads at most {limit}, got {tokens}")
    start = opening(tokenizer)
    every = start + tokenize(tokenizer, content, tokens + 1 - len(start))
    ids = every[:tokens]
    if (n := len(ids)) < 2:
        raise ArgumentError(f"text: expected at least 2 tokens, got {n}")
    pieces = list(_pieces(tokenizer, ids))
    spans = _spans(pieces)

    def planned(length: int, layers: int, units: int) -> Plan:
        bins = max(8, min(_BINS, math.isqrt(_PATTERN_BYTES // units)))
        kept = max(4, min(_TOP, _TOP_BYTES // (3 * n * layers)))
        return Plan(_groups(_even(n, bins)), _groups(spans), _factors(torch.tensor(ids)), kept)

    reducer = Reducer(planned=planned, on_progress=on_progress)
    with subject.evaluating(network), torch.inference_mode(), apply(network, reducer):
        Reader(network).read(ids)
    found = reducer.reduced
    seeing = torch.arange(n, 0, -1) if found.causal else torch.full((n,), n)
    return Inspection(
        model=str(model) if isinstance(model, str | Path) else subject.name_of(network),
        source=source,
        tokens=pieces,
        cut=len(every) > n,
        causal=found.causal,
        # a causal query sees as many keys as there are queries that see the key at its mirror image
        units=list(_units(found, highest=float(seeing.log().mean()))),
        edges=(0, *torch.bincount(found.plan.groups).cumsum(0).tolist()),
        patterns=found.patterns,
        spans=spans,
        flow=found.flow,
        received=found.received / seeing,
        top=found.top,
        shares=found.shares,
    )


def _factors(ids: Tensor) -> dict[str, Tensor]:
    """What the weights (N, N) are multiplied with, and summed, for a mean over queries."""
    n = len(ids)
    gap = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    followed = F.pad(ids[:, None] == ids[:-1], (1, 0)).tril(-1)
    return {
        "itself": torch.eye(n) / n,
        "previous": torch.eye(n).roll(-1, 1).tril(-1) / n,
        "near": (gap < 8) / n,
        "distance": gap / n,
        "first": F.one_hot(torch.zeros(n, dtype=torch.long), n) / n,
        "repetition": followed / followed.any(1).sum().clamp(min=1),
    }


def _units(found: Reduced, highest: float) -> Iterator[Unit]:
    for at, (layer, head) in enumerate(found.units):
        entropy = float(found.entropy[at])
        known = {name: round(float(values[at]), 4) for name, values in found.figures.items()}
        yield Unit(
            layer=layer,
            head=head,
            entropy=round(entropy, 4),
            distance=known["distance"],
            first=known["first"],
            repetition=known["repetition"],
            role=None if head is None else role_of(known, entropy / highest),
        )


def role_of(figures: Mapping[str, float], entropy: float) -> str:
    """One of `ROLES`, from the shares that `Unit` is made from and the entropy as part of the highest."""
    decided = {
        "itself": figures["itself"] >= 0.5,
        "previous token": figures["previous"] >= 0.4,
        "repetition": figures["repetition"] >= 0.3,
        "first token": figures["first"] >= 0.6,
        "nearby": figures["near"] >= 0.6,
        "broad": entropy >= 0.7,
    }
    return next((role for role, holds in decided.items() if holds), "mixed")


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """Each token as it reads after the one before: alone, some tokenizers lose its space."""
    before = ""
    for i, token in enumerate(ids):
        both = tokenizer.decode(ids[max(0, i - 1) : i + 1], clean_up_tokenization_spaces=False)
        before = tokenizer.decode(ids[i - 1 : i], clean_up_tokenization_spaces=False) if i else before
        yield both[len(before) :] or tokenizer.decode([token]) or "\ufffd"


def _spans(pieces: Sequence[str]) -> tuple[int, ...]:
    """Edges of about twelve pieces of similar length that end with a sentence where one ends nearby."""
    n = len(pieces)
    even, ends = _even(n, _SPANS), [i + 1 for i, p in enumerate(pieces) if p.rstrip().endswith((".", "!", "?"))]
    reach = n / len(even) / 2.5
    edges = {0, n}
    for edge in even[1:-1]:
        nearest = min(ends, key=lambda end: abs(end - edge), default=edge)
        edges.add(nearest if abs(nearest - edge) <= reach else edge)
    return tuple(sorted(edges))


def _even(length: int, bins: int) -> tuple[int, ...]:
    bins = min(length, bins)
    return tuple(length * i // bins for i in range(bins + 1))


def _groups(edges: Sequence[int]) -> Tensor:
    """(N,) which of the runs between the edges each position is in."""
    return torch.repeat_interleave(torch.tensor(edges).diff())
