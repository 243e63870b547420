"""Landmark attention: a token that closes each block answers for it, so blocks are found by ordinary attention."""

from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.attention import Partial, attention, merge
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.masks import Mask
from regard.masks.grid import Segments
from regard.mechanisms.base import KV, Mechanism, Pattern, seen
from regard.positions import rotary_angles, rotate, rotate_tokens
from regard.positions.axial import pairs_to_halves

SELECTIONS = ("token_head", "head_max", "token_max")


class Blocks(NamedTuple):
    """What `LandmarkAttention.recall` carries; keys are not rotated.

    Attributes:
        key, value: (B, Hk, blocks, m + 1, D), the newest blocks that the capacity allows, oldest first.
        rest_key, rest_value: (B, Hk, r, D), the unfinished block, r ≤ m.
        length: tokens seen, landmarks included.
    """

    key: Tensor
    value: Tensor
    rest_key: Tensor
    rest_value: Tensor
    length: int


class LandmarkAttention(Mechanism):
    """Landmark attention (arXiv:2305.16300): causal, tokens in blocks of m and after each block its landmark l_b.

        own tokens of query i:  s_ij,                       j ≤ i in i's block, no landmark
        earlier block b:        (o_ib, ·) = softmax attention of i to b's m tokens,  with s_i,l_b for its log-sum-exp
        y_i = Wo [merge(own, blocks)]_h

    So a softmax over own tokens and earlier landmarks gives each block its share, and landmarks have no value. x
    (B, N, C) to (B, N, C); every (m + 1)-th token is a landmark unless ``is_landmark`` says otherwise. Exact, one fused
    call per block; with ``is_landmark`` through the N×N scores. `stream` continues exactly; `recall` is the paper's
    inference: queries see the ``top_k`` blocks whose landmarks they like best, of at most ``capacity``, at positions
    that never grow.

    Args:
        dim, num_heads, num_kv_heads, head_dim: C, H, key heads and D.
        block_size: m, without the landmark.
        top_k: blocks to recall.
        capacity: blocks held by `recall`.
        selection: blocks are chosen per query and head ("token_head"), by the head that likes them best ("head_max") or
            by the query of the chunk that does ("token_max").
        rope_theta: base of the rotary angles; None leaves positions out.
        bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N² C); in recall O(N (N/m + k m) C)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        block_size: int = 50,
        top_k: int = 5,
        capacity: int = 1024,
        selection: str = "token_head",
        rope_theta: float | None = 10_000.0,
        bias: bool = False,
    ):
        super().__init__()
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        if block_size < 1:
            raise ArgumentError(f"block_size: expected at least 1, got {block_size}")
        if not 1 <= top_k <= capacity:
            raise ArgumentError(f"top_k: expected 1 to {capacity} (capacity), got {top_k}")
        if selection not in SELECTIONS:
            raise ArgumentError(f"selection: expected one of {', '.join(SELECTIONS)}, got {selection!r}")
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.block_size, self.top_k, self.capacity = block_size, top_k, capacity
        self.selection, self.rope_theta = selection, rope_theta
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        is_landmark: Tensor | None = None,
    ) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.qkv(x)
        q, k = rotate_tokens(q, self.rope_theta), rotate_tokens(k, self.rope_theta)
        if is_landmark is None:
            return self.o_proj(merge_heads(landmark_attention(q, k, v, self.block_size, valid=valid).out))
        if is_landmark.dtype != torch.bool or is_landmark.shape != x.shape[:2]:
            raise ShapeError(
                f"is_landmark: expected bool {tuple(x.shape[:2])}, got {is_landmark.dtype} {tuple(is_landmark.shape)}"
            )
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        scores = q @ k.mT * self.head_dim**-0.5
        return self.o_proj(merge_heads(landmark_grouped_softmax(scores, is_landmark, _causal(x, valid)) @ v))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self.qkv(x)
        q, k = rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past)
        state = KV.append(state, k, v, valid)
        out = landmark_attention(q, state.key, state.value, self.block_size, past, state.valid).out
        return self.o_proj(merge_heads(out)), state

    def recall(self, x: Tensor, state: Blocks | None = None) -> tuple[Tensor, Blocks]:
        """The next n tokens, which see themselves, the unfinished block before them, and blocks they choose.

        With k blocks or fewer at hand nothing needs a choice. As published, all but the newest k blocks are compared as
        if they stood in one place, and chosen ones are put side by side; the tokens stand after k + 1 blocks.
        """
        self._check(x, dim=self.dim)
        q, k, v = self.qkv(x)
        side = self.block_size + 1
        if state is None:
            none = k.unflatten(2, (1, -1))[:, :, :0, :1].expand(-1, -1, -1, side, -1)
            state = Blocks(none, none, k[:, :, :0], v[:, :, :0], 0)
        rest = state.rest_key.shape[2]
        first = min(state.length // side, self.top_k + 1) * side
        q = rotate_tokens(q, self.rope_theta, first + rest)
        k, v = torch.cat([state.rest_key, k], 2), torch.cat([state.rest_value, v], 2)
        near = landmark_attention(q, rotate_tokens(k, self.rope_theta, first), v, self.block_size, rest)
        far = self._far(q, state) if state.key.shape[2] else []
        full = k.shape[2] // side * side
        keys, values = (t[:, :, :full].unflatten(2, (-1, side)) for t in (k, v))
        state = Blocks(
            torch.cat([state.key, keys], 2)[:, :, -self.capacity :],
            torch.cat([state.value, values], 2)[:, :, -self.capacity :],
            k[:, :, full:],
            v[:, :, full:],
            state.length + x.shape[1],
        )
        return self.o_proj(merge_heads(merge(near, *far).out)), state

    def _far(self, q: Tensor, state: Blocks) -> list[Partial]:
        """One part for each place of a chosen block, of which every query and head has its own."""
        batch, heads, n, dim = q.shape
        side, blocks = self.block_size + 1, state.key.shape[2]
        count = min(self.top_k, blocks)
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (state.key, state.value))
        newest = torch.arange(blocks, device=q.device) - (blocks - self.top_k)
        slot = (newest + 1).clamp(min=0) if blocks >= self.top_k else newest.new_zeros(blocks)
        landmarks = self._rotate(key[:, :, :, -1], slot * side + self.block_size)
        liked = (q @ landmarks.mT * dim**-0.5).softmax(-1)
        if self.selection != "token_head":
            liked = liked.amax(1 if self.selection == "head_max" else 2, keepdim=True).expand_as(liked)
        chosen = liked.topk(count, dim=-1).indices.sort(-1).values  # (B, H, n, count)
        item = torch.arange(batch, device=q.device)[:, None, None]
        head = torch.arange(heads, device=q.device)[:, None]
        token = torch.arange(side, device=q.device)
        query = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # every query is a batch item: (B·n, H, 1, D)
        parts = []
        for place in range(count):
            block = chosen[..., place]
            position = (place * side + (slot[block] > 0) * side).unsqueeze(-1) + token
            k, v = self._rotate(key[item, head, block], position), value[item, head, block]
            k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
            part = _gated(query, k, v, None)
            out, lse = (t.squeeze(2).unflatten(0, (batch, n)).transpose(1, 2) for t in part)
            parts.append(Partial(out, lse))
        return parts

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope_theta is None else rotate(x, *rotary_angles(positions, x.shape[-1], self.rope_theta))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, D), keys and values (B, Hk, N, D), not rotated."""
        k, v = (split_heads(proj(x), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        return split_heads(self.q_proj(x), self.num_heads), k, v

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "LandmarkAttention":
        """``CausalSelfAttention`` of lm_benchmark, from its model's arguments; ``cache`` holds those of its cache."""
        arguments = official_arguments(official_kwargs)
        module = cls(**arguments)
        state = {name: tensor for name, tensor in state_dict.items() if name != "bias"}  # its causal mask
        split_rows(state, "c_attn", ("q_proj", "k_proj", "v_proj"))
        for name in state:
            if name.startswith(("q_proj", "k_proj")):  # published pairs are neighbours, ours are half a head apart
                state[name] = pairs_to_halves(state[name], module.num_heads)
        load_strictly(module, state, {"c_proj": "o_proj"})
        return module


def official_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Our arguments for those of the published model; what acts in training only (dropouts, jumps of positions) is not.

    Raises:
        Unsupported: another softmax, other positions, or a learned score for the rest.
    """
    for name, known in (("softmax_func", "mem_opt"), ("positional_encoder", "rotary"), ("enable_rem_score", False)):
        if (value := config.get(name, known)) != known:
            raise Unsupported(f"{name}: only {known!r} is known, got {value!r}")
    config = {**config, **(config.get("cache") or {})}
    names = {"per_token_and_head": "token_head", "max_over_heads": "head_max", "max_over_tokens": "token_max"}
    selection = config.get("cache_selection_method", "per_token_and_head")
    if selection not in names:
        raise ArgumentError(f"cache_selection_method: expected one of {', '.join(names)}, got {selection!r}")
    size = config.get("mem_freq") or config.get("mem_cache_freq") or 50
    if (config.get("mem_cache_freq") or size) != size:
        raise ArgumentError(f"mem_cache_freq: expected mem_freq = {size}, got {config['mem_cache_freq']}")
    top_k = config.get("cache_topk", 1)
    return {
        "dim": config["n_embd"],
        "num_heads": config["n_head"],
        "block_size": size,
        "top_k": top_k,
        "capacity": config.get("mem_cache_size") or max(1024, top_k),
        "selection": names[selection],
        "bias": config.get("bias", False),
    }


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, past: int = 0, valid: Tensor | None = None
) -> Partial:
    """The grouped softmax as merged parts: every block answers with its landmark's score as log-sum-exp.

    Args:
        q: (B, H, n, D), the tokens after ``past`` others.
        k, v: (B, Hk, past + n, D), of which every (block_size + 1)-th is a landmark.
        valid: (B, past + n) bool, False marks padding.
    """
    n, total, side = q.shape[2], k.shape[2], block_size + 1
    own = own_tokens(block_size).shift(past)
    parts = [attention(q, k, v, mask=own if valid is None else own & masks.padding(valid), return_lse=True)]
    for start in range(0, total - side + 1, side):
        first = max(start + side - past, 0)  # the first query after the landmark
        if first >= n:
            break
        block = slice(start, start + side)
        out, lse = _gated(q[:, :, first:], k[:, :, block], v[:, :, block], None if valid is None else valid[:, block])
        parts.append(Partial(F.pad(out, (0, 0, first, 0)), F.pad(lse, (first, 0), value=-torch.inf)))
    return merge(*parts)


@lru_cache(maxsize=64)
def own_tokens(block_size: int) -> Mask:
    """The tokens of a query's block so far, without landmarks; one value per size, so that plans are kept."""
    side = block_size + 1
    return masks.causal() & Segments(side, 0) & masks.from_function(lambda b, h, i, j: j % side < block_size)


def _gated(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Partial:
    """Attention to a block's tokens that weighs as much as its landmark, the last key; both seen by all queries."""
    tokens = None if valid is None else valid[:, None, None, :-1]
    out = attention(q, k[:, :, :-1], v[:, :, :-1], mask=tokens)
    landmark = k[:, :, -1].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    score = torch.einsum("bhnd,bhd->bhn", q, landmark).to(torch.promote_types(q.dtype, torch.float32))
    score = score * q.shape[-1] ** -0.5
    return Partial(out, score if valid is None else score.masked_fill(~valid[:, -1, None, None], -torch.inf))


def landmark_grouped_softmax(scores: Tensor, is_landmark: Tensor, mask: Tensor) -> Tensor:
    """The weights, for landmarks anywhere.

    Args:
        scores: (B, H, N, M).
        is_landmark: (B, M) or (M,) bool.
        mask: bool, broadcastable to (B, 1, N, M), True = may be seen.

    Returns:
        (B, H, N, M): rows sum to 1, landmarks have none.

    Raises:
        ShapeError: the sizes do not fit.
    """
    if scores.dim() != 4 or is_landmark.shape[-1:] != scores.shape[-1:]:
        raise ShapeError(
            f"is_landmark: expected {scores.shape[-1:]} keys of scores (B, H, N, M), got {tuple(is_landmark.shape)}"
        )
    landmark = is_landmark.expand(scores.shape[0], -1)[:, None, None]
    block = landmark.cumsum(-1) - landmark.long()  # landmarks before a key
    mask = mask.expand(scores.shape[0], 1, *scores.shape[-2:])
    own = block == block.masked_fill(~mask, -1).amax(-1, keepdim=True)
    first, inner = mask & (own ^ landmark), mask & ~own & ~landmark
    p = scores.masked_fill(~first, torch.finfo(scores.dtype).min).softmax(-1) * first
    index, groups = block.expand_as(scores), int(block.max()) + 1
    zeros = scores.new_zeros(*scores.shape[:-1], groups)
    peak = zeros.scatter_reduce(-1, index, scores.detach().masked_fill(~inner, -torch.inf), "amax", include_self=False)
    peak = peak.masked_fill(peak.isinf(), 0.0)
    e = (scores - peak.gather(-1, index)).masked_fill(~inner, -torch.inf).exp()
    total = zeros.scatter_add(-1, index, e)
    gate = zeros.scatter_add(-1, index, p * landmark)
    share = gate / total.masked_fill(total == 0, 1.0)
    return p * ~landmark + e * share.gather(-1, index)


def insert_landmarks(ids: Tensor, block_size: int, landmark_id: int, rest: int = 0) -> Tensor:
    """Token ids (B, N) with a landmark after every ``block_size``, the first ``rest`` tokens of a block being past."""
    if ids.dim() != 2:
        raise ShapeError(f"ids: expected (B, N), got {tuple(ids.shape)}")
    if not 0 <= rest < block_size:
        raise ArgumentError(f"rest: expected 0 to {block_size - 1}, got {rest}")
    n = ids.shape[1]
    place = torch.arange(n, device=ids.device)
    out = ids.new_full((len(ids), n + (rest + n) // block_size), landmark_id)
    out[:, place + (rest + place) // block_size] = ids
    return out


def _causal(x: Tensor, valid: Tensor | None) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return mask if valid is None else mask & valid[:, None, None]
