"""What was recorded of a model's attention: by layer, to slice, compare, save and load."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regard.errors import ArgumentError
from regard.sites.site import Kind


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """Statistics of one site's weights w (B, H, N, M): of N queries, and M keys by their positions.

    Attributes:
        name, kind: of the site: its dotted name in the model, and "decoder", "encoder" or "cross".
        queries, top: positions of the queries in ``rows``, and of those in ``top_keys``.
        counted: (B,) number of queries that counted, all but padding.
        mass: (B, H, M), what each key received, summed over queries.
        entropy, peak: (B, H, N), of each query, in nats and as a share; 0 for padding.
        distance: (B, H, bins), mass by distance in the bins of ``edges``, summed over queries; in tokens, in patches
            where the model reads a picture, and 0 in cross-attention, which has none.
        spans: (B, H, N, S), mass of each query on each span.
        rows: (B, H, R, M), weights of the chosen queries.
        top_keys, top_weights: (B, H, T, K), the keys that the chosen queries attend to most, and how much.
    """

    name: str
    kind: Kind
    queries: tuple[int, ...]
    top: tuple[int, ...]
    counted: Tensor
    mass: Tensor
    entropy: Tensor
    peak: Tensor
    distance: Tensor
    spans: Tensor
    rows: Tensor
    top_keys: Tensor
    top_weights: Tensor

    @property
    def edges(self) -> tuple[int, ...]:
        """Bin b of ``distance`` holds edges[b] <= distance < edges[b + 1]."""
        return (0, *(2**b for b in range(self.distance.shape[-1])))

    @property
    def mean_entropy(self) -> Tensor:
        """(B, H), of a query's weights, in nats."""
        return self.entropy.sum(-1) / self._count

    @property
    def mean_distance(self) -> Tensor:
        """(B, H), every bin taken at its middle; nan where there are no distances."""
        edges = torch.tensor(self.edges, dtype=torch.float32)
        middle = (edges[:-1] + edges[1:] - 1) / 2
        return self.distance @ middle / self.distance.sum(-1)

    @property
    def _count(self) -> Tensor:
        return self.counted.clamp(min=1)[:, None]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor that has heads."""
        return (
            (f.name, value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.ndim > 1
        )


@dataclass(frozen=True, eq=False)
class Recording:
    """What `record` returns.

    Attributes:
        layers: by index of the site: the layer, where each has one; in an encoder-decoder, sites are counted through.
        spans: names of the spans, in the order of `LayerRecord.spans`.
        heads: indices of the heads in the records' second dimension.
    """

    layers: Mapping[int, LayerRecord]
    spans: tuple[str, ...]
    heads: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of key positions, in the first layer where they differ."""
        return self._first.mass.shape[-1]

    @property
    def queries(self) -> tuple[int, ...]:
        """Positions of the rows that were kept, in the first layer where they differ."""
        return self._first.queries

    @property
    def counted(self) -> Tensor:
        """(B,) number of queries that counted, in the first layer where they differ."""
        return self._first.counted

    @property
    def _first(self) -> LayerRecord:
        return next(iter(self.layers.values()))

    def of(self, kind: Kind) -> "Recording":
        """The sites of one kind: "decoder", "encoder" or "cross".

        Raises:
            ArgumentError: none were recorded.
        """
        chosen = [i for i, layer in self.layers.items() if layer.kind == kind]
        if not chosen:
            there = " and ".join(sorted({layer.kind for layer in self.layers.values()}))
            raise ArgumentError(f"kind: recorded were {there} sites, not {kind!r}")
        return self.select(layers=chosen)

    def select(
        self,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        spans: Sequence[str] | None = None,
    ) -> "Recording":
        """The same of some layers, heads and spans, in the order asked for.

        Raises:
            ArgumentError: some were not recorded.
        """
        layers = list(self.layers) if layers is None else list(layers)
        heads = list(self.heads) if heads is None else list(heads)
        names = list(self.spans) if spans is None else list(spans)
        asked: tuple[tuple[str, list[Any], Sequence[Any]], ...]
        asked = ("layers", layers, [*self.layers]), ("heads", heads, self.heads), ("spans", names, self.spans)
        for what, wanted, known in asked:
            if missing := [one for one in wanted if one not in known]:
                raise ArgumentError(f"{what}: recorded were {sorted(known)}, not {missing}")
        at = [self.spans.index(name) for name in names]
        places = [self.heads.index(head) for head in heads]
        chosen = {}
        for i in layers:
            tensors: dict[str, Any] = {name: t[:, places] for name, t in self.layers[i].tensors()}
            chosen[i] = replace(self.layers[i], **tensors | {"spans": tensors["spans"][..., at]})
        return replace(self, layers=chosen, spans=tuple(names), heads=tuple(heads))

    def span(self, name: str) -> dict[int, Tensor]:
        """By layer, the mean share (B, H) of each head's attention that went to a named span.

        Raises:
            ArgumentError: there is no such span.
        """
        if name not in self.spans:
            raise ArgumentError(f"name: the spans are {', '.join(self.spans) or 'none'}, got {name!r}")
        at = self.spans.index(name)
        return {i: layer.spans[..., at].sum(-1) / layer._count for i, layer in self.layers.items()}

    def flow(self, spans: Mapping[str, Sequence[int]]) -> dict[int, Tensor]:
        """By layer, (B, H, Q, S): the mean share that the queries of each group gave to each recorded span.

        Args:
            spans: groups of queries: names and positions.

        Raises:
            ArgumentError: a group is empty or has positions that are no queries.
        """
        found = {}
        for i, layer in self.layers.items():
            n = layer.spans.shape[2]
            for name, positions in spans.items():
                if not positions or not all(0 <= p < n for p in positions):
                    raise ArgumentError(f"spans: {name!r} must be some of the positions 0..{n - 1}")
            found[i] = torch.stack([layer.spans[:, :, list(p)].mean(2) for p in spans.values()], 2)
        return found

    def mean_entropy(self) -> dict[int, Tensor]:
        """By layer, the mean entropy (B, H) of a query's weights, in nats."""
        return {i: layer.mean_entropy for i, layer in self.layers.items()}

    def mean_distance(self) -> dict[int, Tensor]:
        """By layer, the mean distance (B, H) of attention, every bin taken at its middle."""
        return {i: layer.mean_distance for i, layer in self.layers.items()}

    def compare(self, other: "Recording") -> dict[int, dict[str, float]]:
        """By layer, the largest difference of every statistic from that of another recording of the same tokens.

        Raises:
            ArgumentError: the two do not describe the same layers, heads, tokens and spans.
        """
        if self._shape() != other._shape():
            raise ArgumentError("other: expected the same layers, heads, spans, queries and number of tokens")
        return {
            i: {
                name: float((t - getattr(other.layers[i], name)).abs().max()) if t.numel() else 0.0
                for name, t in layer.tensors()
                if t.is_floating_point()
            }
            for i, layer in self.layers.items()
        }

    def _shape(self) -> Any:
        layers = [(i, x.kind, x.queries, x.top, [t.shape for _, t in x.tensors()]) for i, x in self.layers.items()]
        return self.heads, self.spans, layers

    def save(self, folder: str | Path) -> None:
        """Write ``recording.safetensors`` and ``recording.json`` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{f}": getattr(layer, f).contiguous() for i, layer in self.layers.items() for f in _TENSORS}
        save_file(tensors, folder / "recording.safetensors")
        layers = [{"index": i, **{f: getattr(layer, f) for f in _PLAIN}} for i, layer in self.layers.items()]
        about = {"layers": layers, "spans": self.spans, "heads": self.heads}
        (folder / "recording.json").write_text(json.dumps(about, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Recording":
        """What `save` wrote.

        Raises:
            ArgumentError: the folder holds no recording.
        """
        path = Path(folder) / "recording.json"
        if not path.exists():
            raise ArgumentError(f"folder: expected one that Recording.save wrote, got {str(folder)!r}")
        about, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        layers = {}
        for layer in about["layers"]:
            i = layer.pop("index")
            plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in layer.items()}
            layers[i] = LayerRecord(**plain | {name: tensors[f"{i}.{name}"] for name in _TENSORS})
        return cls(layers, tuple(about["spans"]), tuple(about["heads"]))


_TENSORS = [field.name for field in fields(LayerRecord) if field.type is Tensor]
_PLAIN = [field.name for field in fields(LayerRecord) if field.type is not Tensor]
