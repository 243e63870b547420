"""`record`: where a model looks, at any length, without the matrices of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.statistics import Statistics, statistics
from regard.errors import ArgumentError, Unsupported
from regard.probes.heap import trim
from regard.probes.recording import LayerRecord, Recording
from regard.sites import Call, Method, Site, apply
from regard.sites.site import Kind

_LIMIT = 1 << 30
_LARGE = 1 << 20  # weights per head
Queries = Sequence[int] | Literal["all"]


@dataclass(kw_only=True)
class Recorder(Method):
    """Record statistics of attention as it runs: of an input, and of the tokens generated after it.

        recorder = Recorder(tokens={"question": range(3, 20)}, queries=[-1])
        with regard.apply(model, recorder):
            model.generate(**inputs, max_new_tokens=50)
        recorder.recording.mean_entropy()[12]

    It reads queries and keys after the methods that stand before it changed them. A forward with an empty cache starts
    a new recording; later ones continue it.

    Args:
        layers, only_heads: indices; all by default.
        tokens: names and positions of tokens, in this order, whose mass is recorded; "first" (position 0, the usual
            sink or class token) comes by itself. In an encoder-decoder they are tokens of the encoder's input.
        queries: positions whose weights are kept whole; negative ones count from the end of the input. "all" keeps
            the full maps.
        top, top_k: positions whose ``top_k`` keys with the largest weights are kept.
        grid: rows and columns of patches, the last tokens of a picture; distances are counted in patches then.
        max_bytes: the kept weights may not need more.
    """

    name: ClassVar[str] = "recorder"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"decoder", "encoder", "cross"})
    only_heads: Sequence[int] | None = None
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    queries: Queries = ()
    top: Queries = ()
    top_k: int = 8
    grid: tuple[int, int] | None = None
    max_bytes: int = _LIMIT

    def __post_init__(self) -> None:
        for name, positions in self.tokens.items():
            if min(positions, default=0) < 0:
                raise ArgumentError(f"tokens: {name!r} has positions below 0")
        if self.top_k < 1:
            raise ArgumentError(f"top_k must be at least 1, got {self.top_k}")
        self._sites: list[Site] = []
        self._parts: dict[int, _Parts] = {}

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        if self.layers is not None and (unknown := set(self.layers) - {site.index for site in sites}):
            raise ArgumentError(f"layers: the model has layers 0..{len(sites) - 1}, got {sorted(unknown)}")
        self._sites = [site for site in sites if self.acts_on(site)]
        self._parts.clear()

    @property
    def recording(self) -> Recording:
        """What was recorded since the last empty cache.

        Raises:
            ArgumentError: the model was not run.
            Unsupported: it was, but computed no attention that could be seen, in any layer or one that was asked for.
        """
        if not self._sites:
            raise ArgumentError("nothing was recorded: run the model inside `with regard.apply(model, recorder)`")
        silent = [site for site in self._sites if site.index not in self._parts]
        if silent and (self.layers is not None or len(silent) == len(self._sites)):
            listed = ", ".join(f"{site.name} ({type(site.module).__name__})" for site in silent[:3])
            raise Unsupported(
                f"nothing was recorded of {listed}: it did not run, has no weights, or computes them by itself; a "
                "torch.nn.MultiheadAttention must be called with need_weights=False"
            )
        layers = {i: parts.joined() for i, parts in sorted(self._parts.items())}
        count = next(iter(layers.values())).mass.shape[1]
        heads = tuple(range(count)) if self.only_heads is None else tuple(self.only_heads)
        return Recording(layers, ("first", *self.tokens), heads)

    def after(self, call: Call) -> None:
        step, site = call.step, call.site
        assert step.positions is not None  # every call inside `regard.apply` has them
        n, m = call.query.shape[2], call.key.shape[2]
        if site.kind == "decoder" and int(step.positions.max()) >= m:
            raise Unsupported(f"recording where keys were dropped: {site.name} holds {m} for {step.positions.max()}")
        if step.past == 0:
            self._parts[site.index] = _Parts(site)
            self._parts[site.index].asked = self._resolved("queries", n), self._resolved("top", n)
            self._check_memory(call)
        parts = self._parts[site.index]
        rows, top = (_of_these(asked, step.past, n) for asked in parts.asked)
        found = statistics(
            call.query,
            call.key,
            mask=call.mask,
            bias=call.bias,
            scale=call.scale,
            spans=self._spans(call),
            rows=rows,
            top=top,
            top_k=self.top_k,
            places=self._places(call),
            valid=step.valid,
            heads=self.only_heads,
        )
        parts.add(found, [q + step.past for q in rows], [q + step.past for q in top], step.valid)
        if n * m >= _LARGE:
            trim()  # layers would each leave holes in the heap: at 8,192 tokens they came to 300 MB

    def _resolved(self, name: Literal["queries", "top"], n: int) -> list[int] | None:
        """The positions, in order; None for all."""
        asked = getattr(self, name)
        if isinstance(asked, str):
            if asked != "all":
                raise ArgumentError(f"{name}: expected positions or 'all', got {asked!r}")
            return None
        resolved = sorted({q + n if q < 0 else q for q in asked})
        if resolved and resolved[0] < 0:
            raise ArgumentError(f"{name}: the input has {n} tokens, got {min(asked)}")
        return resolved

    def _check_memory(self, call: Call) -> None:
        """Refuse before anything is kept what the sites of this kind would keep of this input."""
        n, m = call.query.shape[2], call.key.shape[2]
        rows, top = (n if asked is None else len(asked) for asked in self._parts[call.site.index].asked)
        heads = call.query.shape[1] if self.only_heads is None else len(self.only_heads)
        alike = sum(site.kind == call.site.kind for site in self._sites)
        needed = call.query.shape[0] * heads * alike * (4 * rows * m + 12 * top * min(self.top_k, m))
        if needed > self.max_bytes:
            raise ArgumentError(
                f"queries: the weights asked for need {needed:,} bytes, max_bytes is {self.max_bytes:,}"
            )

    def _spans(self, call: Call) -> Tensor:
        """(1, 1, M, 1 + spans) membership of each key."""
        m = call.key.shape[2]
        inside = torch.zeros(m, 1 + len(self.tokens), dtype=torch.bool, device=call.key.device)
        inside[:1, 0] = True
        reads_another = any(site.kind == "cross" for site in self._sites)
        if call.site.kind != "decoder" or not reads_another:
            for at, positions in enumerate(self.tokens.values(), 1):
                inside[[p for p in positions if p < m], at] = True
        return inside[None, None]

    def _places(self, call: Call) -> Tensor | None:
        """Where tokens lie: in a row, on the grid, or nowhere."""
        m = call.key.shape[2]
        if call.site.kind == "cross":
            return torch.full((m, 1), -1)
        if self.grid is None or call.site.kind == "decoder":
            return None
        height, width = self.grid
        first = m - height * width  # a class token and registers come before
        if not 0 <= first < min(m, 16):
            return torch.full((m, 2), -1)
        patches = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        return torch.cat([torch.full((first, 2), -1), patches])


class _Parts:
    """What one site gave, forward by forward."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.asked: tuple[list[int] | None, list[int] | None] = [], []
        self._found: list[Statistics] = []
        self._queries: list[int] = []
        self._top: list[int] = []
        self._counted: Tensor | int = 0

    def add(self, found: Statistics, queries: list[int], top: list[int], valid: Tensor | None) -> None:
        self._found.append(Statistics(**{name: tensor.cpu() for name, tensor in vars(found).items()}))
        self._queries += queries
        self._top += top
        batch, n = found.entropy.shape[0], found.entropy.shape[2]
        self._counted = self._counted + (torch.full((batch,), n) if valid is None else valid.sum(1).cpu())

    def joined(self) -> LayerRecord:
        """The statistics of consecutive queries as one; earlier ones knew fewer keys and smaller distances."""
        parts = self._found

        def summed(name: str) -> Tensor:
            size = max(getattr(part, name).shape[-1] for part in parts)
            return torch.stack([_widened(getattr(part, name), size) for part in parts]).sum(0)

        def together(name: str, dim: int) -> Tensor:
            size = max(getattr(part, name).shape[-1] for part in parts)
            if dim == -2:
                return torch.cat([_widened(getattr(part, name), size) for part in parts], -2)
            return torch.cat([getattr(part, name) for part in parts], dim)

        assert isinstance(self._counted, Tensor)
        return LayerRecord(
            self.site.name,
            self.site.kind,
            tuple(self._queries),
            tuple(self._top),
            self._counted,
            mass=summed("mass"),
            entropy=together("entropy", -1),
            peak=together("peak", -1),
            distance=summed("distance"),
            spans=together("spans", -2),
            rows=together("rows", -2),
            top_keys=together("top_keys", -2),
            top_weights=together("top_weights", -2),
        )


def _of_these(asked: list[int] | None, past: int, n: int) -> list[int]:
    """Which of the queries past, ..., past + n - 1 were asked for, counted from the first of them."""
    return list(range(n)) if asked is None else [q - past for q in asked if 0 <= q - past < n]


def _widened(tensor: Tensor, size: int) -> Tensor:
    return F.pad(tensor, (0, size - tensor.shape[-1]))


def record(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Mapping[str, Sequence[int]] | None = None,
    queries: Queries = (),
    top: Queries = (),
    top_k: int = 8,
    grid: tuple[int, int] | None = None,
    max_new_tokens: int = 0,
    max_bytes: int = _LIMIT,
) -> Recording:
    """Run a model once and record where it looks; see `Recorder` for the arguments.

        found = regard.record(model, tokenizer(text, return_tensors="pt"), queries=[-1])
        found.mean_entropy()[0], found.span("first")[5], found.layers[5].rows

    It works on language models, vision transformers and encoder-decoders of transformers, on timm's, on regard's own
    modules, and on others whose attention modules are made known with `regard.sites.register`.

    Args:
        inputs: token ids (B, N), pictures (B, C, H, W), or whatever the model takes first; or its arguments by name.
        grid: of the patches of a picture; found out by itself where the model says the size of its patches.
        max_new_tokens: generate so many tokens, greedily, and record those too.

    Raises:
        ArgumentError: an argument that fits neither model nor tokens, or weights beyond ``max_bytes``.
        Unsupported: attention that cannot be reached, or keys that were dropped.
    """
    given = inputs if isinstance(inputs, Mapping) else {getattr(model, "main_input_name", ""): inputs}
    recorder = Recorder(
        layers=layers,
        only_heads=heads,
        tokens={} if tokens is None else tokens,
        queries=queries,
        top=top,
        top_k=top_k,
        grid=_grid(model, given) if grid is None else grid,
        max_bytes=max_bytes,
    )
    named = {name: value for name, value in given.items() if name}
    first = [value for name, value in given.items() if not name]
    with torch.no_grad(), apply(model, recorder):
        if max_new_tokens:
            model.generate(*first, **named, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
        else:
            model(*first, **named)
    return recorder.recording


def _grid(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a picture's patches, where the model says how large they are."""
    picture = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim == 4), None)
    patch = patch_size(model)
    if picture is None or patch is None:
        return None
    return picture.shape[-2] // patch[0], picture.shape[-1] // patch[1]


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the patches that a model cuts pictures into, where it says so."""
    holder: Any = getattr(model, "patch_embed", None) or getattr(model, "config", None)  # timm's, transformers'
    size = getattr(holder, "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])
