"""What an encoder-decoder's tokens depend on, by hiding parts of its input (SPES, arXiv:2411.01710)."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError, require

#: masks (b, *shape), 1 where something is hidden, and targets to probabilities (b, I, V)
ProbFn = Callable[[Tensor, Tensor | None], Tensor]
Segments = Literal["auto", "slic", "grid"]
_EPS = 1e-12
_CHUNK = 2**23  # products of scores and masks held at once: 32 MB in float32


def kl_scorer(p: Tensor, q: Tensor) -> Tensor:
    """``Σ_v p_v (log p_v - log q_v)`` in nats, over the last axis; 1e-12 is added inside both logarithms."""
    return (p * (p + _EPS).log() - p * (q + _EPS).log()).sum(-1)


def occlusion_saliency(
    prob_fn: ProbFn,
    masks: Tensor | Iterable[Tensor],
    targets: Tensor | None = None,
    *,
    original: Tensor | None = None,
    scorer: Callable[[Tensor, Tensor], Tensor] = kl_scorer,
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """How much each token's distribution changes when a place is hidden, on average over the masks that hide it.

        SM_i(x) = Σ_m D_m(i) o_m(x) / Σ_m o_m(x)      D_m(i) = KL(P(i) ‖ P_m(i))      0 where nothing ever was hidden

    P(i) is the model's distribution of token i with the given tokens before it, P_m(i) the same with everything hidden
    that mask o_m is 1 at. Of the estimate's error, 1/√M is left after M masks. M forward passes; a few masks at a time
    are held as numbers.

    Args:
        prob_fn: what the model answers with masks (b, ...) at work: probabilities (b, I, V). It is given ``targets``
            too. The hidden places may be of the input, of encoder frames or of the decoder's embeddings, see `hide`.
        masks: (M, ...) of bool or numbers 0 and 1, or batches of such.
        targets: (I,) tokens that are forced, the same for all masks.
        original: P (I, V); by default what ``prob_fn`` answers with nothing hidden.
        scorer: (I, V) and (b, I, V) to (b, I).
        batch_size: masks at a time.
        on_progress: called with the number of masks done.

    Returns:
        (I, ...), in the scorer's units.

    Raises:
        ArgumentError: no masks.
        ShapeError: answers of another shape.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
    heat: Tensor | None = None
    times: Tensor | None = None
    done = 0
    for batch in masks.split(batch_size) if isinstance(masks, Tensor) else masks:
        if original is None:
            original = prob_fn(torch.zeros_like(batch[:1]), targets)[0]
        found = prob_fn(batch, targets)
        if found.shape != (len(batch), *original.shape):
            raise ShapeError(f"prob_fn: expected {(len(batch), *original.shape)}, got {tuple(found.shape)}")
        hidden = batch.to(found.dtype)
        score = scorer(original, found)
        rows = max(1, _CHUNK // score[0].numel() // hidden[0].numel())
        for some, where in zip(score.split(rows), hidden.flatten(1).split(rows), strict=True):
            seen = (some[:, :, None] * where[:, None]).sum(0).view(-1, *batch.shape[1:])
            heat = seen if heat is None else heat + seen
        times = hidden.sum(0) if times is None else times + hidden.sum(0)
        done += len(batch)
        if on_progress is not None:
            on_progress(done)
    if heat is None or times is None:
        raise ArgumentError("masks: expected at least one")
    return torch.where(times > 0, heat / times.clamp(min=1), 0.0)


def standardise_token_maps(saliency: Tensor, *, causal: bool = False) -> Tensor:
    """Each token's map (I, ...) with mean 0 and standard deviation 1 (unbiased); 0 where that is impossible.

    The variance is taken as E[x²] - E[x]², as published, in the precision of the map: give float64 where numbers are
    large beside their spread.

    Args:
        causal: maps (I, I) over the tokens before; only places up to a token's own count, later ones become 0.
    """
    flat = saliency.flatten(1)
    counts = torch.ones_like(flat, dtype=torch.bool)
    if causal:
        if flat.shape[1] != len(flat):
            raise ShapeError(f"saliency: causal maps are (I, I), got {tuple(saliency.shape)}")
        counts = counts.tril()
    n = counts.sum(1, keepdim=True)
    seen = torch.where(counts, flat, 0.0)
    mean, square = seen.sum(1, keepdim=True) / n, seen.square().sum(1, keepdim=True) / n
    std = ((square - mean.square()) * n / (n - 1)).sqrt()
    same = ((flat == flat[:, :1]) | ~counts).all(1, keepdim=True)
    found = ((flat - mean) / std).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return torch.where(counts & ~same, found, 0.0).view_as(saliency)


def hide(x: Tensor, masks: Tensor, fill: float = 0.0) -> Tensor:
    """x (*shape, ...) once for each mask (b, *shape), with ``fill`` where it is 1; one of frames hides whole vectors.

    With spectrograms of mean 0 the fill of 0 is the mean.
    """
    if x.shape[: masks.dim() - 1] != masks.shape[1:]:
        raise ShapeError(f"masks: expected (b, *{tuple(x.shape)}) or its first axes, got {tuple(masks.shape)}")
    shown = masks.bool().view(*masks.shape, *(1,) * (x.dim() + 1 - masks.dim()))
    return torch.where(shown, torch.as_tensor(fill, dtype=x.dtype, device=x.device), x)


def frame_masks(length: int, n_masks: int, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """(n_masks, length) bool, each frame hidden with probability p: for encoder outputs and for target embeddings."""
    _check(p, n_masks)
    return torch.rand(n_masks, length, generator=generator) < p


def slic_masks(
    spec: Tensor,
    n_segments: Sequence[int] = (2000, 2500, 3000),
    p: float = 0.5,
    n_masks: int = 20000,
    generator: torch.Generator | None = None,
    *,
    segments: Segments = "auto",
    full_length: int = 750,
    compactness: float = 0.1,
    sigma: float = 1.0,
) -> Tensor:
    """(n_masks, T, F) bool: of a spectrogram cut into segments, each hidden with probability p.

    The masks are shared out over segmentations of several fineness. Those of T frames fewer than ``full_length`` have
    T / full_length of the segments.

    Args:
        spec: (T, F).
        n_segments: of each segmentation, about.
        p: of hiding a segment.
        n_masks: of all of them together.
        generator: of the masks.
        segments: "slic" (superpixels of the spectrogram scaled to [0, 1]; needs scikit-image), "grid" (rectangles) or
            "auto" (slic where scikit-image is installed, else grid).
        full_length: frames from which the numbers of segments are meant as they are.
        compactness, sigma: of SLIC.

    Raises:
        ShapeError: no (T, F).
        ArgumentError: a number out of range.
        MissingExtra: "slic" without scikit-image.
    """
    if spec.dim() != 2:
        raise ShapeError(f"spec: expected (T, F), got {tuple(spec.shape)}")
    _check(p, n_masks)
    if not n_segments or min(n_segments) < 1:
        raise ArgumentError(f"n_segments: expected numbers from 1, got {n_segments}")
    if segments not in ("auto", "slic", "grid"):
        raise ArgumentError(f"segments: expected 'auto', 'slic' or 'grid', got {segments!r}")
    with_slic = segments == "slic" or (segments == "auto" and find_spec("skimage") is not None)
    share = min(1.0, len(spec) / full_length)
    found = []
    for i, wanted in enumerate(n_segments):
        count = max(1, round(wanted * share))
        if with_slic:
            labels = slic_segments(spec, count, compactness, sigma)
        else:
            labels = grid_segments(len(spec), spec.shape[1], count)
        rows = n_masks // len(n_segments) + (i < n_masks % len(n_segments))
        found.append((torch.rand(rows, int(labels.max()) + 1, generator=generator) < p)[:, labels])
    return torch.cat(found)


def slic_segments(spec: Tensor, count: int, compactness: float = 0.1, sigma: float = 1.0) -> Tensor:
    """(T, F) labels from 0 of about ``count`` superpixels (SLIC) of a spectrogram scaled to [0, 1].

    Raises:
        MissingExtra: scikit-image is not installed.
    """
    segmentation = require("skimage.segmentation", "cut spectrograms into superpixels")
    spread = spec.amax() - spec.amin()
    scaled = ((spec - spec.amin()) / spread.clamp(min=1e-12)).double().cpu().numpy()
    labels = segmentation.slic(
        scaled, n_segments=count, compactness=compactness, sigma=sigma, channel_axis=None, start_label=0
    )
    return torch.as_tensor(labels, dtype=torch.long)


def grid_segments(frames: int, channels: int, count: int) -> Tensor:
    """(frames, channels) labels from 0 of about ``count`` rectangles as square as can be."""
    side = (frames * channels / count) ** 0.5
    rows = min(frames, max(1, round(frames / side)))
    columns = min(channels, max(1, round(count / rows)))
    row, column = torch.arange(frames) * rows // frames, torch.arange(channels) * columns // channels
    return row[:, None] * columns + column


def _check(p: float, n_masks: int) -> None:
    if not 0 < p < 1:
        raise ArgumentError(f"p: expected a probability between 0 and 1, got {p}")
    if n_masks < 1:
        raise ArgumentError(f"n_masks: expected at least 1, got {n_masks}")
