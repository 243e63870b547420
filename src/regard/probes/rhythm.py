"""Preplan and anchor (arXiv:2510.13554): where a model opens a thought, and what later tokens come back to.

All of it is read from the weights A (L, H, N, N) of one pass over prompt and response. R are the response's positions,
given as a mask (N,), which leaves out padding; of packed texts each has a mask of its own. What is returned per token
has one number for each of R, in order. Sums are taken in the dtype of the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.probes.recorder import record

Mode = Literal["local", "global", "coupled"]


def sampled_layers(num_layers: int, count: int = 5) -> list[int]:
    """So many layers, evenly from floor(L / 3) to floor(2 L / 3); fewer where there are not so many."""
    if num_layers < 1 or count < 1:
        raise ArgumentError(f"num_layers, count: expected at least 1, got {num_layers}, {count}")
    return sorted(set(torch.linspace(num_layers // 3, 2 * num_layers // 3, count).round().long().tolist()))


def attention_span(attn: Tensor, response_mask: Tensor) -> Tensor:
    """(L, H) how far back each head looks: d = mean over t in R of Σ_s A_ts (t - s)."""
    positions = _positions(attn, response_mask)
    distance = (positions[:, None] - torch.arange(attn.shape[-1], device=attn.device)).to(attn.dtype)
    return (attn[..., positions, :] * distance).sum(-1).mean(-1)


def split_heads(span: Tensor, frac: float = 0.3) -> tuple[Tensor, Tensor]:
    """Local and global heads, (L, H) flags each: the share `frac` of smallest and of largest spans, one at least.

    Of equal spans the head of the smaller index counts as the smaller.
    """
    if not 0 < frac <= 0.5:
        raise ArgumentError(f"frac must be above 0 and at most 0.5, got {frac}")
    if span.numel() < 2:
        raise ShapeError(f"span: expected two heads at least, got {tuple(span.shape)}")
    count = max(1, _share(frac, span.numel()))
    order = span.flatten().sort(stable=True).indices
    flags = torch.zeros(2, span.numel(), dtype=torch.bool, device=span.device)
    flags[0, order[:count]], flags[1, order[-count:]] = True, True
    return flags[0].view_as(span), flags[1].view_as(span)


def waad(a_local: Tensor, response_mask: Tensor, window_size: int = 10) -> Tensor:
    """(R,) windowed average attention distance: Σ_s A_ts min(t - s, W), with A (N, N) the mean of the local heads.

    It falls inside a chunk of words that depend on the one before, and jumps where a new one is opened.
    """
    if window_size < 1:
        raise ArgumentError(f"window_size must be at least 1, got {window_size}")
    positions = _positions(a_local, response_mask)
    distance = (positions[:, None] - torch.arange(a_local.shape[-1], device=a_local.device)).clamp(max=window_size)
    return (a_local[positions] * distance.to(a_local.dtype)).sum(-1)


def fai(a_global: Tensor, response_mask: Tensor, h_lo: int = 10, h_hi: int = 100) -> Tensor:
    """(R,) future attention influence: the mean of A_ts over t in R with s + h_lo <= t <= s + h_hi.

    A (N, N) is the mean of the global heads. Tokens without such t, the last `h_lo`, get 0.
    """
    if not 0 <= h_lo <= h_hi:
        raise ArgumentError(f"h_lo, h_hi: expected 0 <= h_lo <= h_hi, got {h_lo}, {h_hi}")
    positions = _positions(a_global, response_mask)
    gap = positions[:, None] - positions
    later = ((gap >= h_lo) & (gap <= h_hi)).to(a_global.dtype)
    return (a_global[positions][:, positions] * later).sum(0) / later.sum(0).clamp(min=1)


def variation(waad: Tensor) -> Tensor:
    """(R,) Δ_t = |WAAD_t - WAAD_{t+1}|; 0 for the last token."""
    change = torch.zeros_like(waad)
    change[:-1] = (waad[1:] - waad[:-1]).abs()
    return change


def rhythm_credit(
    waad: Tensor,
    fai: Tensor,
    mode: Mode = "coupled",
    q: float = 0.4,
    amp: float = 1.5,
    alpha: float = 0.5,
    k: int = 3,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> Tensor:
    """γ (R,), what the advantage of each token of a response is multiplied with; it carries no gradient.

        local:    γ_t = 1 + (amp - 1) [t in TopQ(Δ)]
        global:   γ_t = 1 + (amp - 1) [t in TopQ(FAI)]
        coupled:  γ_t = 1 + (amp - 1) ([t in TopQ(FAI) \\ D] + (1 - α) [t in D] + α [t in I(D)])

    D are anchors in the middle of a chunk, WAAD_t <= τ_waad, that follow a jump: max Δ_u >= τ_delta over the `k` tokens
    u before. Part of their credit goes to I(D), where those jumps were largest. The paper gives no α and no τ.

    Args:
        q: TopQ are the floor(q R) largest, one at least; of equal ones the earlier. Tokens without FAI are no anchors.
        tau_waad: by default the median of WAAD.
        tau_delta: by default the smallest Δ in TopQ(Δ).

    Raises:
        ShapeError: waad and fai are not both (R,).
        ArgumentError: an unknown mode, or a number out of its range.
    """
    if waad.dim() != 1 or waad.shape != fai.shape or not len(waad):
        raise ShapeError(f"waad, fai: expected (R,) both, got {tuple(waad.shape)} and {tuple(fai.shape)}")
    if mode not in get_args(Mode):
        raise ArgumentError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if not 0 < q <= 1 or not 0 <= alpha <= 1 or k < 1:
        raise ArgumentError(f"expected 0 < q <= 1, 0 <= alpha <= 1 and k >= 1, got q={q}, alpha={alpha}, k={k}")
    waad, fai = waad.detach(), fai.detach()
    change = variation(waad)
    jumps, anchors = top_share(change, q), top_share(fai, q) & (fai > 0)
    if mode != "coupled":
        return 1 + (amp - 1) * (jumps if mode == "local" else anchors).to(waad.dtype)
    low = waad <= (waad.quantile(0.5) if tau_waad is None else tau_waad)
    cut = change[jumps].min() if tau_delta is None else tau_delta
    before = torch.cat([change.new_full((k,), -torch.inf), change])[:-1].unfold(0, k, 1)  # (R, k): Δ_{t-k} .. Δ_{t-1}
    largest, place = before.max(-1).values, before.argmax(-1)
    dominated = anchors & low & (largest >= cut)
    introduced = torch.zeros_like(anchors)
    at = torch.arange(len(waad), device=waad.device) - k + place
    introduced[at[dominated]] = True
    rest, moved, given = (flags.to(waad.dtype) for flags in (anchors & ~dominated, dominated, introduced))
    share = rest + (1 - alpha) * moved + alpha * given
    return 1 + (amp - 1) * share


def top_share(values: Tensor, q: float) -> Tensor:
    """(R,) flags of the floor(q R) largest, one at least; of equal ones the earlier."""
    chosen = values.sort(descending=True, stable=True).indices[: max(1, _share(q, len(values)))]
    flags = torch.zeros_like(values, dtype=torch.bool)
    flags[chosen] = True
    return flags


@dataclass(frozen=True, eq=False)
class Rhythm:
    """What `record_rhythm` reads of one response.

    Attributes:
        waad, fai: (R,).
        span: (L, H) of the sampled layers. local_heads, global_heads: (L, H) flags.
        layers: which they are.
    """

    waad: Tensor
    fai: Tensor
    span: Tensor
    local_heads: Tensor
    global_heads: Tensor
    layers: tuple[int, ...]

    @property
    def variation(self) -> Tensor:
        """(R,) Δ."""
        return variation(self.waad)

    def credit(self, mode: Mode = "coupled", **options: Any) -> Tensor:
        """`rhythm_credit` of this response."""
        return rhythm_credit(self.waad, self.fai, mode, **options)


def rhythm_of_maps(
    attn: Tensor,
    response_mask: Tensor,
    *,
    layers: Sequence[int] = (),
    frac: float = 0.3,
    window_size: int = 10,
    h_lo: int = 10,
    h_hi: int = 100,
) -> Rhythm:
    """All of it from weights (L, H, N, N); `layers` only names them."""
    span = attention_span(attn, response_mask)
    local, distant = split_heads(span, frac)
    return Rhythm(
        waad(attn[local].mean(0), response_mask, window_size),
        fai(attn[distant].mean(0), response_mask, h_lo, h_hi),
        span,
        local,
        distant,
        tuple(layers) or tuple(range(len(attn))),
    )


def record_rhythm(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    response_mask: Tensor,
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> list[Rhythm]:
    """Preplan and anchor tokens of a batch of responses, from one forward and a few layers' maps.

        found = record_rhythm(model, tokens, torch.arange(n) >= prompt_length)[0]
        advantages = found.credit("coupled") * advantage

    Args:
        model: a language model, as in `regard.record`.
        inputs: token ids (B, N) of prompts and responses, or the arguments of the model.
        response_mask: (N,) or (B, N) bool, the response's tokens without padding.
        layers: whose heads to use; by default five from the middle third.
        options: of `rhythm_of_maps`.

    Raises:
        ShapeError, ArgumentError: a mask that does not fit the tokens or is empty; as `regard.record`.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    mask = torch.as_tensor(response_mask, dtype=torch.bool).cpu()
    if mask.shape not in (ids.shape, ids.shape[1:]):
        raise ShapeError(
            f"response_mask: expected {tuple(ids.shape)} or {tuple(ids.shape[1:])}, got {tuple(mask.shape)}"
        )
    if layers is None:
        layers = sampled_layers(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    found = record(model, inputs, layers=layers, queries=range(ids.shape[1]))
    maps = torch.stack([found.layers[i].rows for i in layers], 1)  # (B, L, H, N, N)
    return [
        rhythm_of_maps(each, flags, layers=layers, **options)
        for each, flags in zip(maps, mask.expand(ids.shape), strict=True)
    ]


def token_entropy(logits: Tensor) -> Tensor:
    """(..., N) entropy in nats of the distributions (..., N, vocabulary) that the tokens after them are drawn from."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def _positions(attn: Tensor, response_mask: Tensor) -> Tensor:
    n = attn.shape[-1]
    if attn.dim() < 2 or attn.shape[-2] != n or response_mask.shape != (n,):
        raise ShapeError(
            f"expected weights (..., N, N) and a response_mask (N,), got {tuple(attn.shape)} and "
            f"{tuple(response_mask.shape)}"
        )
    positions = response_mask.to(attn.device).bool().nonzero()[:, 0]
    if not len(positions):
        raise ArgumentError("response_mask: expected some tokens of a response, got none")
    return positions


def _share(q: float, n: int) -> int:
    """floor(q n), unmoved by the rounding of the product."""
    return int(q * n + 1e-9)
