"""`record`: where a language model looks, at any length, without the matrices of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.statistics import Statistics, statistics
from regard.errors import ArgumentError, Unsupported
from regard.probes.recording import LayerRecord, Recording
from regard.sites import Call, Method, Site, apply

_LIMIT = 1 << 30


@dataclass(kw_only=True)
class Recorder(Method):
    """Record statistics of attention as it runs: of a prompt, and of the tokens generated after it.

        recorder = Recorder(spans={"question": range(3, 20)}, queries=[-1])
        with regard.apply(model, recorder):
            model.generate(**inputs, max_new_tokens=50)
        recorder.recording.mean_entropy()[12]

    It reads queries and keys after the methods that stand before it changed them. A forward with an empty cache starts
    a new recording; later ones continue it.

    Args:
        layers, only_heads: indices; all by default.
        spans: names and positions of tokens, in this order, whose mass is recorded; "first" (position 0, the usual
            sink) comes by itself.
        queries: positions whose weights are kept whole; negative ones count from the end of the prompt.
        max_bytes: the kept weights may not need more.
    """

    name: ClassVar[str] = "recorder"
    only_heads: Sequence[int] | None = None
    spans: Mapping[str, Sequence[int]] = field(default_factory=dict)
    queries: Sequence[int] = ()
    max_bytes: int = _LIMIT

    def __post_init__(self) -> None:
        for name, positions in self.spans.items():
            if min(positions, default=0) < 0:
                raise ArgumentError(f"spans: {name!r} has positions below 0")
        self._parts: dict[int, list[Statistics]] = {}
        self._kept: tuple[int, ...] = ()
        self._counted: dict[int, Tensor] = {}
        self._sites = 0

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        if self.layers is not None and (unknown := set(self.layers) - {site.index for site in sites}):
            raise ArgumentError(f"layers: the model has layers 0..{len(sites) - 1}, got {sorted(unknown)}")
        self._sites = len(sites) if self.layers is None else len(self.layers)
        self._parts.clear()

    @property
    def recording(self) -> Recording:
        """What was recorded since the last empty cache.

        Raises:
            ArgumentError: nothing was.
        """
        if not self._parts:
            raise ArgumentError("nothing was recorded: run the model inside `with regard.apply(model, recorder)`")
        layers = {i: _joined(parts) for i, parts in sorted(self._parts.items())}
        counted = next(iter(self._counted.values())).cpu()
        count = next(iter(layers.values())).mass.shape[1]
        heads = tuple(range(count)) if self.only_heads is None else tuple(self.only_heads)
        return Recording(layers, ("first", *self.spans), self._kept, counted, heads)

    def after(self, call: Call) -> None:
        positions, valid = call.step.positions, call.step.valid
        assert positions is not None  # every call inside `regard.apply` has them
        index, n, m = call.site.index, call.query.shape[2], call.key.shape[2]
        if int(positions.max()) >= m:
            raise Unsupported(f"recording where keys were dropped: {call.site.name} holds {m} for {positions.max()}")
        if call.past == 0:
            self._start(call, m)
        found = statistics(
            call.query,
            call.key,
            mask=call.mask,
            bias=call.bias,
            scale=call.scale,
            spans=self._spans(m, call.key.device),
            rows=[position - (m - n) for position in self._kept if m - n <= position < m],
            valid=valid,
            heads=self.only_heads,
        )
        part = Statistics(**{name: tensor.cpu() for name, tensor in vars(found).items()})
        self._parts[index].append(part)
        new = torch.full((call.query.shape[0],), n) if valid is None else valid.sum(1).cpu()
        self._counted[index] = self._counted[index] + new if index in self._counted else new

    def _start(self, call: Call, m: int) -> None:
        self._kept = tuple(sorted({q + m if q < 0 else q for q in self.queries}))
        if self._kept and self._kept[0] < 0:
            raise ArgumentError(f"queries: the prompt has {m} tokens, got {min(self.queries)}")
        heads = call.query.shape[1] if self.only_heads is None else len(self.only_heads)
        needed = 4 * self._sites * call.query.shape[0] * heads * len(self._kept) * m
        if needed > self.max_bytes:
            raise ArgumentError(f"queries: their weights need {needed:,} bytes, max_bytes is {self.max_bytes:,}")
        self._parts[call.site.index] = []
        self._counted.pop(call.site.index, None)

    def _spans(self, m: int, device: torch.device) -> Tensor:
        """(1, 1, M, 1 + spans) membership of each key."""
        inside = torch.zeros(m, 1 + len(self.spans), dtype=torch.bool, device=device)
        inside[0, 0] = True
        for at, positions in enumerate(self.spans.values(), 1):
            inside[[p for p in positions if p < m], at] = True
        return inside[None, None]


def record(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    spans: Mapping[str, Sequence[int]] | None = None,
    queries: Sequence[int] = (),
    max_new_tokens: int = 0,
    max_bytes: int = _LIMIT,
) -> Recording:
    """Run a language model once and record where it looks; see `Recorder` for the arguments.

        found = regard.record(model, tokenizer(text, return_tensors="pt"), queries=[-1])
        found.mean_entropy()[0], found.span("first")[5], found.layers[5].rows

    Args:
        inputs: token ids (B, N), or the arguments of the model.
        max_new_tokens: generate so many tokens after them, greedily, and record those too.

    Raises:
        ArgumentError: an argument that fits neither model nor tokens, or weights beyond ``max_bytes``.
        Unsupported: attention that cannot be reached, or keys that were dropped.
    """
    recorder = Recorder(
        layers=layers, only_heads=heads, spans={} if spans is None else spans, queries=queries, max_bytes=max_bytes
    )
    given: dict[str, Any] = {"input_ids": inputs} if isinstance(inputs, Tensor) else {**inputs}
    with torch.no_grad(), apply(model, recorder):
        if max_new_tokens:
            model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
        else:
            model(**given)
    return recorder.recording


def _joined(parts: list[Statistics]) -> LayerRecord:
    """The statistics of consecutive queries as one; earlier ones knew fewer keys and smaller distances."""
    m, bins = (max(getattr(part, name).shape[-1] for part in parts) for name in ("mass", "distance"))

    def widened(tensor: Tensor, size: int) -> Tensor:
        return F.pad(tensor, (0, size - tensor.shape[-1]))

    return LayerRecord(
        mass=torch.stack([widened(part.mass, m) for part in parts]).sum(0),
        entropy=torch.cat([part.entropy for part in parts], -1),
        peak=torch.cat([part.peak for part in parts], -1),
        distance=torch.stack([widened(part.distance, bins) for part in parts]).sum(0),
        spans=torch.cat([part.spans for part in parts], -2),
        rows=torch.cat([widened(part.rows, m) for part in parts], -2),
    )
