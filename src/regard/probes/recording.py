"""What was recorded of a model's attention: by layer, to slice, compare, save and load."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regard.attention.statistics import distance_edges
from regard.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """Statistics of one layer's weights w (B, H, N, M): of N queries, and M keys by their positions.

    Attributes:
        mass: (B, H, M), what each key received, summed over queries.
        entropy, peak: (B, H, N), of each query, in nats and as a share; 0 for padding.
        distance: (B, H, bins), mass by distance, in the bins of `Recording.distance_edges`, summed over queries.
        spans: (B, H, N, S), mass of each query on each span.
        rows: (B, H, R, M), weights of the chosen queries.
    """

    mass: Tensor
    entropy: Tensor
    peak: Tensor
    distance: Tensor
    spans: Tensor
    rows: Tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True, eq=False)
class Recording:
    """What `record` returns.

    Attributes:
        layers: by layer index.
        spans: names of the spans, in the order of `LayerRecord.spans`.
        queries: positions of the rows that were kept.
        counted: (B,) number of queries that counted, all but padding.
        heads: indices of the heads in the records' second dimension.
    """

    layers: Mapping[int, LayerRecord]
    spans: tuple[str, ...]
    queries: tuple[int, ...]
    counted: Tensor
    heads: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of key positions."""
        return next(iter(self.layers.values())).mass.shape[-1]

    @property
    def distance_edges(self) -> tuple[int, ...]:
        """Bin b of ``distance`` holds edges[b] <= distance < edges[b + 1]."""
        return distance_edges(self.length)

    def select(self, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> "Recording":
        """The same of some layers and heads, in the order asked for.

        Raises:
            ArgumentError: some were not recorded.
        """
        layers = list(self.layers) if layers is None else list(layers)
        heads = list(self.heads) if heads is None else list(heads)
        for name, wanted, known in (("layers", layers, set(self.layers)), ("heads", heads, set(self.heads))):
            if missing := [i for i in wanted if i not in known]:
                raise ArgumentError(f"{name}: recorded were {sorted(known)}, not {missing}")
        places = [self.heads.index(head) for head in heads]
        chosen = {i: LayerRecord(**{name: t[:, places] for name, t in self.layers[i].tensors()}) for i in layers}
        return replace(self, layers=chosen, heads=tuple(heads))

    def span(self, name: str) -> dict[int, Tensor]:
        """By layer, the mean share (B, H) of each head's attention that went to a named span.

        Raises:
            ArgumentError: there is no such span.
        """
        if name not in self.spans:
            raise ArgumentError(f"name: the spans are {', '.join(self.spans) or 'none'}, got {name!r}")
        at = self.spans.index(name)
        return {i: layer.spans[..., at].sum(-1) / self._count() for i, layer in self.layers.items()}

    def mean_entropy(self) -> dict[int, Tensor]:
        """By layer, the mean entropy (B, H) of a query's weights, in nats."""
        return {i: layer.entropy.sum(-1) / self._count() for i, layer in self.layers.items()}

    def mean_distance(self) -> dict[int, Tensor]:
        """By layer, the mean distance (B, H) of attention, every bin taken at its middle."""
        edges = torch.tensor(self.distance_edges, dtype=torch.float32)
        middle = (edges[:-1] + edges[1:] - 1) / 2
        return {
            i: layer.distance @ middle / layer.distance.sum(-1).clamp(min=1e-12) for i, layer in self.layers.items()
        }

    def compare(self, other: "Recording") -> dict[int, dict[str, float]]:
        """By layer, the largest difference of every statistic from that of another recording of the same tokens.

        Raises:
            ArgumentError: the two do not describe the same layers, heads, tokens and spans.
        """
        same = (list(self.layers), self.heads, self.spans, self.queries, self.length)
        if same != (list(other.layers), other.heads, other.spans, other.queries, other.length):
            raise ArgumentError("other: expected the same layers, heads, spans, queries and number of tokens")
        return {
            i: {
                name: float((t - getattr(other.layers[i], name)).abs().max()) if t.numel() else 0.0
                for name, t in layer.tensors()
            }
            for i, layer in self.layers.items()
        }

    def save(self, folder: str | Path) -> None:
        """Write ``recording.safetensors`` and ``recording.json`` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": t.contiguous() for i, layer in self.layers.items() for name, t in layer.tensors()}
        save_file({**tensors, "counted": self.counted}, folder / "recording.safetensors")
        about: dict[str, Any] = {"layers": list(self.layers), "spans": self.spans, "queries": self.queries}
        (folder / "recording.json").write_text(json.dumps({**about, "heads": self.heads}, indent=1))

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
        names = [field.name for field in fields(LayerRecord)]
        layers = {i: LayerRecord(**{name: tensors[f"{i}.{name}"] for name in names}) for i in about["layers"]}
        spans, queries, heads = (tuple(about[name]) for name in ("spans", "queries", "heads"))
        return cls(layers, spans, queries, tensors["counted"], heads)

    def _count(self) -> Tensor:
        return self.counted.clamp(min=1)[:, None]
