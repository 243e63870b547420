"""`inspect`: where a language model looks in one text, by layer, head and token, as a page to click through."""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.statistics import statistics
from regard.errors import ArgumentError, Unsupported
from regard.probes import Recorder, Recording
from regard.sites import Call, Method, Site, apply
from regard.study import png, subject
from regard.study.reading import Reader
from regard.tasks.text import opening, tokenize

LONGEST = 4096  # tokens; a page of more is neither small nor readable
_BINS, _SPANS, _TOP = 48, 12, 16
_PATTERN_BYTES, _TOP_BYTES = 3 * 2**20, 6 * 2**20  # of the page, before base64
_CHUNK_BYTES = 2**28  # of weights held at once

#: what a head does for the most part, in the order in which it is decided
ROLES = {
    "itself": "half of its attention or more stays on the token itself",
    "previous token": "40 % or more goes to the token just before",
    "repetition": "where the token occurred before, 30 % or more goes to what followed it then",
    "first token": "60 % or more goes to the first token, which usually means: nothing found",
    "nearby": "60 % or more stays within 7 tokens",
    "broad": "its entropy is 70 % or more of the highest possible",
    "mixed": "none of these",
}


@dataclass(frozen=True)
class Unit:
    """A head, or the mean over the heads of a layer (head None): means over the text's tokens as queries.

    Attributes:
        entropy: of the weights, in nats.
        distance: tokens back, as far as the bins of a `Recording` tell.
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
class Inspection:
    """What `inspect` returns.

    Attributes:
        model, source: where model and text come from.
        tokens: the text's tokens as they read.
        cut: the text went on after them.
        units: the heads of every layer, and after those its mean.
        edges: bin b of `patterns` holds positions edges[b] <= p < edges[b + 1].
        patterns: (units, bins, bins), mean attention of the queries of a bin to all keys of a bin.
        spans: edges of the pieces of text that `flow` is about.
        flow: (units, S, S), the same between those pieces.
        received: (units, N), mean share a token got from the queries that see it.
        top, shares: (layers, N, K), the keys each query attends to most, mean over heads, and how much.
        recording: the statistics themselves.
    """

    model: str
    source: str
    tokens: list[str]
    cut: bool
    units: list[Unit]
    edges: tuple[int, ...]
    patterns: Tensor
    spans: tuple[int, ...]
    flow: Tensor
    received: Tensor
    top: Tensor
    shares: Tensor
    recording: Recording

    def report(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else.

        Raises:
            MissingExtra: jinja2 is not installed.
        """
        from regard.study.inspect_page import render

        Path(path).write_text(render(self), encoding="utf-8")

    def to_json(self) -> str:
        """The page's data: figures as numbers, tensors as base64 of levels (`png.SMALLEST` to 1) and integers."""
        return json.dumps(
            {
                "tokens": self.tokens,
                "layers": list(self.recording.layers),
                "units": [asdict(unit) for unit in self.units],
                "bins": len(self.edges) - 1,
                "edges": self.edges,
                "patterns": _levels(self.patterns),
                "spans": self.spans,
                "flow": _levels(self.flow),
                "received": _levels(self.received),
                "kept": self.top.shape[-1],
                "top": _base64(self.top.short()),
                "shares": _base64((self.shares * 32767).round().short()),
                "roles": ROLES,
                "smallest": png.SMALLEST,
            },
            separators=(",", ":"),
        )


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

        regard.study.inspect("smollm2", text=Path("letter.txt")).report("inspect.html")

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
    if len(ids) < 2:
        raise ArgumentError(f"text: expected at least 2 tokens, got {len(ids)}")
    pieces = list(_pieces(tokenizer, ids))
    spans = _spans(pieces)
    recorder, rows = Recorder(), _Rows(ids=torch.tensor(ids), spans=spans, on_progress=on_progress)
    with subject.evaluating(network), torch.inference_mode(), apply(network, [recorder, rows]):
        Reader(network).read(ids)
    recording = recorder.recording
    found = [rows.found[i] for i in recording.layers]
    mass = [_with_mean(layer.mass[0]) for layer in recording.layers.values()]
    return Inspection(
        model=str(model) if isinstance(model, str | Path) else subject.name_of(network),
        source=source,
        tokens=pieces,
        cut=len(every) > len(ids),
        units=[unit for i in recording.layers for unit in _units(recording, i, rows.found[i].repetition)],
        edges=rows.edges,
        patterns=torch.cat([layer.pattern for layer in found]),
        spans=spans,
        flow=torch.cat([layer.flow for layer in found]),
        received=torch.cat(mass) / torch.arange(len(ids), 0, -1),
        top=torch.stack([layer.top for layer in found]),
        shares=torch.stack([layer.shares for layer in found]),
        recording=recording,
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is kept of a layer's weights: (heads + 1, …), the last being the mean, and (N, K)."""

    pattern: Tensor
    flow: Tensor
    repetition: Tensor
    top: Tensor
    shares: Tensor


@dataclass(kw_only=True, eq=False)
class _Rows(Method):
    """Every weight of a prompt, some heads at a time, reduced at once to what a page can show."""

    name: ClassVar[str] = "inspect"
    ids: Tensor
    spans: tuple[int, ...]
    on_progress: Callable[[int, int], None] | None = None

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        self.found: dict[int, _Layer] = {}
        self._sites, n = len(sites), len(self.ids)
        self._kept = min(n, _TOP, max(4, _TOP_BYTES // (4 * n * len(sites))))

    def after(self, call: Call) -> None:
        heads, n, m = call.query.shape[1], call.query.shape[2], call.key.shape[2]
        if n != m or n != len(self.ids):
            raise Unsupported(
                f"inspecting {call.site.name}: it has {n} queries and {m} keys for {len(self.ids)} tokens"
            )
        if not self.found:
            bins = max(8, min(_BINS, math.isqrt(_PATTERN_BYTES // (self._sites * (heads + 1)))))
            self.edges = _even(n, min(n, bins))
        mean, patterns, flows, repetitions = torch.zeros(n, n), [], [], []
        step = max(1, _CHUNK_BYTES // (4 * n * n))
        for start in range(0, heads, step):
            chosen = range(start, min(start + step, heads))
            weights = statistics(
                call.query, call.key, mask=call.mask, bias=call.bias, scale=call.scale, rows=range(n), heads=chosen
            ).rows[0].cpu()  # fmt: skip
            mean += weights.sum(0) / heads
            patterns.append(_binned(weights, self.edges))
            flows.append(_binned(weights, self.spans))
            repetitions.append(self._repetition(weights))
        top = mean.topk(self._kept)
        self.found[call.site.index] = _Layer(
            _with_mean(torch.cat(patterns)),
            _with_mean(torch.cat(flows)),
            _with_mean(torch.cat(repetitions)),
            top.indices,
            top.values,
        )
        if self.on_progress is not None:
            self.on_progress(len(self.found), self._sites)

    def _repetition(self, weights: Tensor) -> Tensor:
        """(heads,): where the query's token occurred before, the mean share of what followed it."""
        followed = F.pad(self.ids[:, None] == self.ids[:-1], (1, 0)).tril(-1)
        asked = followed.any(1)
        return (weights * followed)[:, asked].sum(-1).mean(-1) if asked.any() else torch.zeros(len(weights))


def _units(recording: Recording, layer: int, repetition: Tensor) -> Iterator[Unit]:
    record, count = recording.layers[layer], recording.length
    entropy, distance, first = (
        values[layer][0] for values in (recording.mean_entropy(), recording.mean_distance(), recording.span("first"))
    )
    far = record.distance[0] / record.distance[0].sum(-1, keepdim=True).clamp(min=1e-12)
    highest = sum(math.log(i + 1) for i in range(count)) / count
    figures = (_with_mean(values).tolist() for values in (entropy, distance, first))
    for head, values in enumerate(zip(*figures, repetition.tolist(), strict=True)):
        e, d, f, r = (round(value, 4) for value in values)
        if head == len(far):
            yield Unit(layer, None, e, d, f, r, None)
        else:
            near = far[head].tolist()
            role = _role(near[0], sum(near[1:2]), sum(near[:4]), f, r, e / highest)
            yield Unit(layer, head, e, d, f, r, role)


def _role(itself: float, previous: float, near: float, first: float, repetition: float, entropy: float) -> str:
    decided = (itself >= 0.5, previous >= 0.4, repetition >= 0.3, first >= 0.6, near >= 0.6, entropy >= 0.7, True)
    return next(role for role, holds in zip(ROLES, decided, strict=True) if holds)


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
    even, ends = _even(n, min(n, _SPANS)), [i + 1 for i, p in enumerate(pieces) if p.rstrip().endswith((".", "!", "?"))]
    reach = n / len(even) / 2.5
    edges = {0, n}
    for edge in even[1:-1]:
        nearest = min(ends, key=lambda end: abs(end - edge), default=edge)
        edges.add(nearest if abs(nearest - edge) <= reach else edge)
    return tuple(sorted(edges))


def _even(length: int, bins: int) -> tuple[int, ...]:
    return tuple(length * i // bins for i in range(bins + 1))


def _binned(weights: Tensor, edges: tuple[int, ...]) -> Tensor:
    """(H, N, N) -> (H, bins, bins): mean over the queries of a bin of the sum over the keys of a bin."""
    sizes = torch.tensor(edges).diff()
    inside = F.one_hot(torch.repeat_interleave(sizes), len(sizes)).float()
    return (inside / sizes).T @ (weights @ inside)


def _with_mean(values: Tensor) -> Tensor:
    """(H, …) -> (H + 1, …), the last being the mean."""
    return torch.cat([values, values.mean(0, keepdim=True)])


def _levels(shares: Tensor) -> str:
    """Shares as bytes: 0 for nothing, 1 to 255 logarithmically from `png.SMALLEST` to 1."""
    part = 1 - shares.clamp(min=1e-12).log10() / math.log10(png.SMALLEST)
    return _base64(torch.where(shares > 0, 1 + (part.clamp(0, 1) * 254).round(), 0).to(torch.uint8))


def _base64(tensor: Tensor) -> str:
    """Little-endian, as JavaScript's typed arrays are on the machines there are."""
    values = tensor.contiguous().numpy()
    return b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")
