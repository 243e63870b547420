"""Which heads of a vision transformer matter, and how far its patches look (arXiv:2303.13731)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.probes.recording import Recording
from regard.probes.saliency import evaluating
from regard.sites import Call, Method, Site, apply

#: (layer, head)
Head = tuple[int, int]


def probability_drop(full: Tensor, pruned: Tensor, classes: Tensor) -> Tensor:
    """p[c] - p'[c] of logits (B, K), for classes (B,): (B,)."""
    p, q = (logits.double().softmax(-1) for logits in (full, pruned))
    return (p - q).gather(-1, classes[:, None])[:, 0]


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """(KL(p‖m) + KL(q‖m)) / 2 with m = (p + q) / 2, of distributions (..., K), in nats: from 0 to ln 2."""
    m = (p + q) / 2
    entr = torch.special.entr  # entropy of the mean less the mean of the entropies: no logarithm of zero
    return (entr(m) - (entr(p) + entr(q)) / 2).sum(-1).clamp(0, log(2))


def _jsd(full: Tensor, pruned: Tensor, classes: Tensor) -> Tensor:
    return js_divergence(full.double().softmax(-1), pruned.double().softmax(-1))


def _flip(full: Tensor, pruned: Tensor, classes: Tensor) -> Tensor:
    return (full.argmax(-1) != pruned.argmax(-1)).double()


def _cosine(full: Tensor, pruned: Tensor, classes: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(full.double(), pruned.double(), dim=-1)


#: name -> outputs of the full and the pruned model (B, K) and classes (B,) to a number per picture
METRICS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "prob_drop": probability_drop,
    "jsd": _jsd,
    "flip": _flip,
    "cosine": _cosine,
}


class HeadImportance:
    """What the model's answer loses when one head's output is zero, for every head alone.

    The head's slice of the concatenated outputs is set to zero before the output projection; its attention and the
    residual stay. Per picture, with p = softmax(logits) and p' of the pruned model:

        prob_drop: p[c] - p'[c]    jsd: (KL(p‖m) + KL(p'‖m)) / 2, m = (p + p') / 2    flip: 1[argmax p ≠ argmax p']

    c is the class that the full model predicts, or the label where labels are given. ``cosine`` is 1 - cos(y, y') of
    whatever the model gives, for models without classes. Layers × heads + 1 forward passes over the pictures.

        importance = HeadImportance(model)(images)["jsd"]    # (layers, heads)

    Args:
        model: a vision transformer that `regard.apply` knows; all its layers have equally many heads.
        metrics: names of `METRICS`.
        output: pictures to outputs (B, K), by way of `model`; by default the model's logits.
        batch_size: pictures per forward.

    Raises:
        ArgumentError: an unknown metric.
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Sequence[str] = ("prob_drop", "jsd", "flip"),
        *,
        output: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 64,
    ) -> None:
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ArgumentError(f"metrics: expected some of {', '.join(METRICS)}, got {unknown}")
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.metrics, self.batch_size = model, tuple(metrics), batch_size
        self.output = output if output is not None else lambda images: _logits(model(images))

    def __call__(
        self, images: Tensor, labels: Tensor | None = None, *, on_progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Tensor]:
        """By metric, the mean over pictures (B, C, H, W): (layers, heads), float64; see `per_image`."""
        return {name: t.mean(0) for name, t in self.per_image(images, labels, on_progress=on_progress).items()}

    @torch.no_grad()
    def per_image(
        self, images: Tensor, labels: Tensor | None = None, *, on_progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Tensor]:
        """By metric, (B, layers, heads): the mean over the pictures of a class is the importance for that class.

        Args:
            images: (B, C, H, W).
            labels: (B,), the classes whose probability is looked at.
            on_progress: called with forward passes over the pictures done and their number.

        Raises:
            ShapeError: the model's output is not (B, K), or there are not B labels.
        """
        if labels is not None and labels.shape != images.shape[:1]:
            raise ShapeError(f"labels: expected ({images.shape[0]},), got {tuple(labels.shape)}")
        pruning = Pruning()
        with evaluating(self.model), apply(self.model, pruning):
            full = self._run(images)
            classes = full.argmax(-1) if labels is None else labels
            counts = pruning.counts
            if len(set(counts.values())) != 1:
                raise ArgumentError(f"model: expected equally many heads in every layer, got {list(counts.values())}")
            heads = [(layer, head) for layer in counts for head in range(counts[layer])]
            found: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
            for done, head in enumerate(heads, 1):
                if on_progress is not None:
                    on_progress(done, len(heads) + 1)
                pruning.targets = {head}
                pruned = self._run(images)
                for name in self.metrics:
                    found[name].append(METRICS[name](full, pruned, classes))
            if on_progress is not None:
                on_progress(len(heads) + 1, len(heads) + 1)
        return {name: torch.stack(rows, 1).unflatten(1, (len(counts), -1)) for name, rows in found.items()}

    @torch.no_grad()
    def pruned(self, images: Tensor, heads: Collection[Head]) -> Tensor:
        """The model's outputs (B, K) without some heads, given as pairs (layer, head)."""
        with evaluating(self.model), apply(self.model, Pruning(targets=heads)):
            return self._run(images)

    def _run(self, images: Tensor) -> Tensor:
        out = torch.cat([self.output(batch) for batch in images.split(self.batch_size)])
        if out.shape[0] != images.shape[0] or out.dim() != 2:
            raise ShapeError(f"output: expected ({images.shape[0]}, classes), got {tuple(out.shape)}")
        return out


@dataclass(kw_only=True)
class Pruning(Method):
    """Set the outputs of some heads to zero, before the output projection.

    Args:
        targets: pairs (layer, head); may be changed while the method is applied.
    """

    name: ClassVar[str] = "pruning"
    kinds = frozenset({"encoder", "decoder"})
    targets: Collection[Head] = ()

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        #: layer -> number of heads, of the layers that ran
        self.counts: dict[int, int] = {}
        if unknown := sorted({layer for layer, _ in self.targets} - {site.index for site in sites}):
            raise ArgumentError(f"heads: the model has layers 0..{len(sites) - 1}, got {unknown}")

    def heads(self, call: Call, out: Tensor) -> Tensor:
        layer, count = call.site.index, out.shape[1]
        self.counts[layer] = count
        chosen = [head for at, head in self.targets if at == layer]
        if not chosen:
            return out
        if not all(0 <= head < count for head in chosen):
            raise ArgumentError(f"heads: layer {layer} has heads 0..{count - 1}, got {sorted(chosen)}")
        out = out.clone()
        out[:, chosen] = 0
        return out


def rank_heads(importance: Tensor) -> list[Head]:
    """Heads of (layers, heads), the least important first; of equals the lower (layer, head) first."""
    if importance.dim() != 2:
        raise ShapeError(f"importance: expected (layers, heads), got {tuple(importance.shape)}")
    order = importance.flatten().argsort(stable=True).tolist()
    return [divmod(i, importance.shape[1]) for i in order]


@dataclass(frozen=True, eq=False)
class AttentionStrength:
    """How attention spreads over rings of patches around the query's own, of `attention_strength`.

    Attributes:
        S: (..., H, K), per ring of hops 0..K-1: the whole mass of the ring, or the mean per key in it.
        ring_sizes: (K,), keys in a ring, averaged over the query patches: at the border there are fewer.
        mean_distance: (..., H), Σ k mass_k / Σ mass_k, in hops.
        cls_entries: (..., H) each of cls_cls, cls_patches (sum), patches_cls (mean over queries) and patches_patches
            (mean over queries of the sum over keys); empty without a class token.
        normalise: "mass" or "mean", of S.
    """

    S: Tensor
    ring_sizes: Tensor
    mean_distance: Tensor
    cls_entries: dict[str, Tensor]
    normalise: str


def attention_strength(
    maps: Tensor | Recording,
    grid: int | tuple[int, int],
    cls: bool = True,
    normalise: Literal["mass", "mean"] = "mass",
) -> AttentionStrength:
    """Attention between patches by the hops between them, k = max(|Δrow|, |Δcolumn|).

        S_k = mean over pictures and query patches i of Σ_{j: hop(i, j) = k} A_ij

    With ``normalise="mean"`` each query's ring is divided by the number of keys in it, and queries without keys there
    (a corner is further from its opposite than the middle is from anything) do not count. The masses of all rings and
    patches_cls are 1 together. Windowed models: give the maps and the grid of a window.

    Args:
        maps: weights (..., B, H, N, N), N being the patches, row by row, after the class token; or a recording with
            ``queries="all"``, whose layers become the first dimension.
        grid: rows and columns of patches, or both when equal.
        cls: whether the first token is a class token.

    Raises:
        ArgumentError: normalise, or a recording that does not hold all queries.
        ShapeError: maps that do not fit the grid.
    """
    if normalise not in ("mass", "mean"):
        raise ArgumentError(f"normalise must be 'mass' or 'mean', got {normalise!r}")
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if isinstance(maps, Recording):
        maps = recorded_maps(maps)
    start, count = int(cls), rows * columns
    if maps.dim() < 4 or maps.shape[-2:] != (start + count, start + count):
        raise ShapeError(f"maps: expected (..., B, H, {start + count}, {start + count}), got {tuple(maps.shape)}")
    rings = hop_rings(rows, columns).to(maps.device)
    sizes = rings.sum(-1)  # (K, P)
    patches = maps[..., start:, start:].double()
    mass = torch.stack([(patches * ring).sum(-1) for ring in rings], -2)  # (..., B, H, K, P)
    total = mass.mean(-1).mean(-3)
    strength = total
    if normalise == "mean":
        share = (mass / sizes.clamp(min=1)).sum(-1) / (sizes > 0).sum(-1)
        strength = share.mean(-3)
    hops = torch.arange(len(rings), device=maps.device, dtype=torch.float64)
    entries = {}
    if cls:
        to_class = maps.double()[..., 0]
        own = maps.double()[..., 0, :]
        entries = {
            "cls_cls": own[..., 0].mean(-2),
            "cls_patches": own[..., 1:].sum(-1).mean(-2),
            "patches_cls": to_class[..., 1:].mean(-1).mean(-2),
            "patches_patches": total.sum(-1),
        }
    distance = total @ hops / total.sum(-1).clamp(min=1e-12)
    return AttentionStrength(strength, sizes.double().mean(-1), distance, entries, normalise)


def hop_rings(rows: int, columns: int) -> Tensor:
    """(K, P, P) bool: whether max(|Δrow|, |Δcolumn|) of two patches of the grid is k; K = max(rows, columns)."""
    if min(rows, columns) < 1:
        raise ArgumentError(f"grid: expected at least 1 × 1, got {rows} × {columns}")
    r, c = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    hop = torch.maximum((r[:, None] - r).abs(), (c[:, None] - c).abs())
    return hop == torch.arange(max(rows, columns))[:, None, None]


def recorded_maps(recording: Recording) -> Tensor:
    """(layers, B, H, N, N) of a recording of all queries.

    Raises:
        ArgumentError: some queries were not recorded.
    """
    if recording.queries != tuple(range(recording.length)):
        raise ArgumentError(f"recording: expected the rows of all {recording.length} queries, got {recording.queries}")
    return torch.stack([layer.rows for layer in recording.layers.values()])


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
