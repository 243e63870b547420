"""Where chunks begin and end: predicted from the keys, or labelled from the attention itself.

Boundaries of L tokens are ascending positions from 0 to L, chunk s being tokens ``boundaries[s] .. boundaries[s + 1]``.
"""

import torch
from torch import Tensor

from regard.attention.problem import checked
from regard.errors import ArgumentError
from regard.masks import Mask, causal
from regard.methods.language.dhsa.predictor import BoundaryPredictor

_EXCLUDED = -100.0  # logit of positions whose window reaches beyond the ends
_WEIGHTS_AT_ONCE = 2**22


def key_features(key: Tensor) -> Tensor:
    """Keys (B, Hk, L, D) as the predictors' input (B, Hk·D, L), float32."""
    return key.permute(0, 1, 3, 2).flatten(1, 2).float()


def uniform_boundaries(length: int, chunk_size: int) -> list[int]:
    """Chunks of equal length, the last one shorter."""
    return [*range(0, length, chunk_size), length]


def select_boundaries(
    scores: Tensor,
    num_chunks: int,
    theta: float | None = None,
    nms_window_size: int = 8,
    instruction_tokens: int | None = None,
) -> list[int]:
    """Pick well separated positions of high score; a chunk ends after each.

    Greedy non-maximum suppression: take the highest scores first, skip a position within `nms_window_size` of one
    already taken, stop at `num_chunks`.

    Args:
        scores: (L,).
        theta: only positions with a score above this.
        instruction_tokens: length of the instruction that ends the text: the boundary before it is taken first, and
            none inside it. (As published, the boundary comes to lie one token inside the instruction.)

    Returns:
        Boundaries from 0 to L.
    """
    length = len(scores)
    order = scores.argsort(descending=True, stable=True)
    if theta is not None:
        order = order[scores[order] > theta]
    taken, last = [], length
    near = bytearray(length)  # 1 where a taken position suppresses others

    def take(position: int) -> None:
        taken.append(position)
        reach = slice(max(0, position - nms_window_size), position + nms_window_size + 1)
        near[reach] = b"\1" * len(near[reach])

    if instruction_tokens is not None and len(order):
        if not 0 < instruction_tokens < length:
            raise ArgumentError(f"instruction_tokens must be at least 1 and below {length}, got {instruction_tokens}")
        last = length - instruction_tokens
        take(last)
    for position in order.tolist():
        if position > last:
            continue
        if nms_window_size == 0 or not near[position]:
            take(position)
        if len(taken) >= num_chunks:
            break
    ends = sorted(position + 1 for position in taken)
    return [0, *ends] if ends and ends[-1] == length else [0, *ends, length]


def predict_boundaries(
    predictor: BoundaryPredictor,
    key: Tensor,
    num_chunks: int,
    theta: float | None = None,
    nms_window_size: int = 8,
    instruction_tokens: int | None = None,
    smooth_ends: bool = False,
) -> tuple[list[list[int]], Tensor]:
    """Boundaries of every batch item from its rotated keys (B, Hk, L, D), and the logits (B, L) they come from.

    Args:
        smooth_ends: keep boundaries two windows away from the ends instead of one.
        num_chunks, theta, nms_window_size, instruction_tokens: see `select_boundaries`.
    """
    with torch.no_grad():
        logits = predictor(key_features(key))
    logits = logits.masked_fill(~_inside(logits.shape[1], predictor.window_size, smooth_ends, logits.device), _EXCLUDED)
    found = [select_boundaries(row, num_chunks, theta, nms_window_size, instruction_tokens) for row in logits]
    return found, logits


def label_boundaries(
    query: Tensor,
    key: Tensor,
    num_chunks: int,
    window_size: int = 4,
    theta: float | None = 1.1,
    nms_window_size: int = 8,
    instruction_tokens: int | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[list[list[int]], Tensor]:
    """Boundaries of every batch item from the attention of rotated queries and keys, and the ratios (B, L)."""
    ratios = mass_ratio(query, key, window_size, mask=mask, scale=scale, smooth_ends=True)
    return [select_boundaries(row, num_chunks, theta, nms_window_size, instruction_tokens) for row in ratios], ratios


def mass_ratio(
    query: Tensor,
    key: Tensor,
    window_size: int = 4,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    horizon: int | None = None,
    smooth_ends: bool = False,
    epsilon: float = 1e-6,
) -> Tensor:
    """How differently later queries treat the tokens before and after each position: the labels of DHSA.

        P_t = Σ_i Σ_{j=t-W+1..t} a_ij      F_t = Σ_i Σ_{j=t+1..t+W} a_ij      over queries i >= t + W
        ratio_t = (max(P_t, F_t) + ε) / (min(P_t, F_t) + ε)

    where a are the attention weights averaged over heads. Runs over blocks of queries; memory is O(H · block · L).

    Args:
        query: (B, H, L, D). key: (B, Hk, L, D).
        mask: causal by default.
        horizon: count only the first so many of those queries (the published labels use 4096 on windowed layers).
        smooth_ends: leave two windows at each end without a label (0) instead of one.

    Returns:
        (B, L) float64, 0 where there is no label.
    """
    p = checked(query, key, key, causal() if mask is None else mask, scale=scale)
    if p.n != p.m:
        raise ArgumentError(f"mass_ratio labels a whole text: expected as many queries as keys, got {p.n} and {p.m}")
    w, length = window_size, p.n
    valid = _inside(length, w, smooth_ends, p.device)
    ratios = torch.zeros(p.batch, length, dtype=torch.float64, device=p.device)
    candidates = valid.nonzero().squeeze(-1)
    if not len(candidates):
        return ratios
    first = candidates + w
    stop = torch.full_like(first, length) if horizon is None else (first + horizon).clamp(max=length)
    past, future = (ratios.new_zeros(p.batch, len(candidates)) for _ in range(2))
    keys = p.key.float().unsqueeze(2)
    rows = max(1, _WEIGHTS_AT_ONCE // (p.batch * p.heads * length))
    for start in range(int(first[0]), length, rows):
        block = slice(start, min(start + rows, length))
        q = query[:, :, block].float().unflatten(1, (p.kv_heads, p.groups))
        scores = (q @ keys.mT * p.scale).flatten(1, 2)
        allowed = p.allowed(block)
        assert allowed is not None
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)  # nan: sees nothing
        # sums over the rows above each, so that any run of rows is a difference
        above = torch.nn.functional.pad(weights.double().cumsum(1), (0, 0, 1, 0))
        top, bottom = ((edge - start).clamp(0, block.stop - start) for edge in (first, stop))
        for offset in range(w):
            past += above[:, bottom, candidates - offset] - above[:, top, candidates - offset]
            future += above[:, bottom, candidates + offset + 1] - above[:, top, candidates + offset + 1]
    larger, smaller = torch.maximum(past, future), torch.minimum(past, future)
    ratios[:, candidates] = (larger + epsilon) / (smaller + epsilon)
    return ratios


def _inside(length: int, window_size: int, smooth_ends: bool, device: torch.device) -> Tensor:
    """(L,): positions whose window (or the double of it) lies inside the text."""
    reach = 2 * window_size if smooth_ends else window_size
    position = torch.arange(length, device=device)
    return (position >= reach - 1) & (position < length - reach)
