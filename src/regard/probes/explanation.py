"""How well attention explains: its correlation with saliency, and deletion of what it says matters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.probes.recording import Recording

Attention = Tensor | Sequence[Tensor] | Mapping[int, Tensor] | Recording
Pool = Literal["max2d", "max_mean", "mean"]


def aggregate_cross_attention(
    atts: Attention,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """The mean map (..., I, T') of some layers' heads (arXiv:2509.18010).

    Args:
        atts: by layer, maps (..., H, I, T') after the softmax: a tensor with the layers first, a sequence (such as
            transformers' ``cross_attentions``), a mapping, or a `Recording` made with ``queries="all"``, of which the
            cross-attention is taken where there is some, counted by decoder layers.
        layers, heads: which; all by default.
        pairs: (layer, head) instead, any set of them.

    Raises:
        ArgumentError: no such layer or head, none at all, or both ways of naming them.
    """
    maps = _by_layer(atts)
    if pairs is None:
        count = min(maps[i].shape[-3] for i in maps)
        pairs = [
            (i, h) for i in (maps if layers is None else layers) for h in (range(count) if heads is None else heads)
        ]
    elif layers is not None or heads is not None:
        raise ArgumentError("pairs: expected either these or layers and heads, got both")
    if unknown := [(i, h) for i, h in pairs if i not in maps or not 0 <= h < maps[i].shape[-3]]:
        raise ArgumentError(f"layers, heads: the maps have layers {list(maps)}, and no layer and head {unknown[0]}")
    if not pairs:
        raise ArgumentError("layers, heads: expected at least one of each")
    return torch.stack([maps[i].select(-3, h) for i, h in pairs]).mean(0)


def _by_layer(atts: Attention) -> dict[int, Tensor]:
    if isinstance(atts, Recording):
        cross = [layer.rows for layer in atts.layers.values() if layer.kind == "cross"]
        return dict(enumerate(cross)) if cross else {i: layer.rows for i, layer in atts.layers.items()}
    found = {**atts} if isinstance(atts, Mapping) else dict(enumerate(atts))
    for i, maps in found.items():
        if maps.dim() < 3:
            raise ShapeError(f"atts: expected (..., H, I, T') of each layer, got {tuple(maps.shape)} of layer {i}")
    return found


def pool_saliency(saliency: Tensor, out_len: int, mode: Pool = "max2d") -> Tensor:
    """Saliency (I, T, F) of a spectrogram as (I, T'), one number per frame of the encoder.

    A frame stands for ``⌈T / T'⌉`` of the input's, the last one for what is left.

        max2d    the largest in the block of these frames and all channels
        max_mean the largest channel of each frame, and the mean over frames
        mean     the mean of the block

    Raises:
        ArgumentError: frames that stand for nothing; an unknown mode.
    """
    if saliency.dim() != 3:
        raise ShapeError(f"saliency: expected (I, T, F), got {tuple(saliency.shape)}")
    if mode not in ("max2d", "max_mean", "mean"):
        raise ArgumentError(f"mode: expected max2d, max_mean or mean, got {mode!r}")
    length = saliency.shape[1]
    window = -(-length // out_len) if 1 <= out_len <= length else 0
    if window * (out_len - 1) >= length or not window:
        raise ArgumentError(f"out_len: {length} frames cannot be shared out evenly over {out_len}")
    per_frame = saliency.mean(2) if mode == "mean" else saliency.amax(2)
    if mode == "max2d":
        return F.max_pool1d(per_frame, window, ceil_mode=True)
    # the mean of a last, shorter window is over what it has
    return F.avg_pool1d(per_frame, window, ceil_mode=True)


def explanation_correlation(
    att: Tensor,
    saliency: Tensor,
    frame_norm: bool = False,
    method: Literal["pearson", "spearman"] = "pearson",
) -> Tensor:
    """How much of a saliency attention shows (arXiv:2509.18010): the correlation ρ of the two maps, flattened.

        ρ(CA, SM) over all (i, t):  token i's attention to encoder frame t, and what hiding t does to token i

    Of the input (SM-X: `slic_masks`, `occlusion_saliency`, `standardise_token_maps`, `pool_saliency`) or of the
    encoder's output (SM-H: `frame_masks` instead, and no pooling). Attention comes from `aggregate_cross_attention` of
    a `regard.record(model, ..., queries="all")`. Average ρ over utterances. A map without any variation has ρ = 0: it
    explains nothing.

    Args:
        att: (..., I, T') attention of I tokens to T' frames.
        saliency: (..., I, T'); leading axes broadcast, and are those of the result.
        frame_norm: attention to each frame is first taken to mean 0 and standard deviation 1 over the tokens, which
            removes frames that get much from all of them (sinks).
        method: "pearson", of the numbers, or "spearman", of their ranks (ties share the mean rank).

    Raises:
        ShapeError: maps of different sizes.
    """
    if att.dim() < 2 or saliency.dim() < 2 or att.shape[-2:] != saliency.shape[-2:]:
        raise ShapeError(
            f"att, saliency: expected the same (I, T'), got {tuple(att.shape)} and {tuple(saliency.shape)}"
        )
    if method not in ("pearson", "spearman"):
        raise ArgumentError(f"method: expected pearson or spearman, got {method!r}")
    dtype = torch.promote_types(att.dtype, torch.float64)
    att, saliency = att.to(dtype), saliency.to(dtype)
    if frame_norm:
        if att.shape[-2] < 2:
            raise ShapeError("frame_norm: the standard deviation over tokens needs two of them, got one")
        spread = att.std(-2, keepdim=True)
        att = torch.where(spread > _flat(att), (att - att.mean(-2, keepdim=True)) / spread, 0.0)
    x, y = att.flatten(-2), saliency.flatten(-2)
    if method == "spearman":
        x, y = _ranks(x), _ranks(y)
    flat = (x.std(-1, correction=0) <= _flat(x)[..., 0]) | (y.std(-1, correction=0) <= _flat(y)[..., 0])
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    rho = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return torch.where(flat, 0.0, rho)


def _flat(x: Tensor) -> Tensor:
    """Deviations that are rounding of numbers of this size."""
    return (
        1e-7 * x.abs().amax(-1, keepdim=True).amax(-2, keepdim=True) if x.dim() > 1 else 1e-7 * x.abs().amax(-1, True)
    )


def _ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis; equal numbers share their mean rank."""
    ordered = x.sort(-1).values
    below, upto = (torch.searchsorted(ordered, x.contiguous(), right=right) for right in (False, True))
    return (below + upto + 1).to(x.dtype) / 2


class Deletion(NamedTuple):
    """percentages (S + 1,) of frames taken away, from 0 to 100, and the scores (S + 1,) there."""

    percentages: Tensor
    scores: Tensor


def deletion_curve(
    score_fn: Callable[[Tensor], float],
    relevance: Tensor,
    steps: int = 20,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Deletion:
    """Scores as the most relevant frames are taken away, in equal steps: the faster they fall, the more faithful.

    Args:
        score_fn: (T,) bool, True for what is taken away, to a score of what the model then makes (such as 1 - WER).
        relevance: (T,), or (I, T) of several tokens, of which the mean is taken; frames of equal relevance go in order.
        steps: 20 for 5% each.
        on_progress: called with the number of steps done.
    """
    if steps < 1:
        raise ArgumentError(f"steps: expected at least 1, got {steps}")
    if relevance.dim() not in (1, 2):
        raise ShapeError(f"relevance: expected (T,) or (I, T), got {tuple(relevance.shape)}")
    total = relevance if relevance.dim() == 1 else relevance.mean(0)
    order = total.argsort(descending=True, stable=True)
    scores = []
    for step in range(steps + 1):
        gone = torch.zeros(len(total), dtype=torch.bool, device=total.device)
        gone[order[: round(len(total) * step / steps)]] = True
        scores.append(float(score_fn(gone)))
        if on_progress is not None:
            on_progress(step + 1)
    return Deletion(torch.linspace(0, 100, steps + 1), torch.tensor(scores))


def auc(curve: Deletion) -> float:
    """Area under a deletion curve, by trapezoids: percent times score. Lower is more faithful.

    A score that stays at 1 gives 100; ``100 · scores[0] - auc`` is the area of what was lost, higher for more faithful
    explanations.
    """
    return float(torch.trapezoid(curve.scores, curve.percentages))
