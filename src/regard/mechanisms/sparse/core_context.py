"""Core context aware attention: the far context as one token per group, the near context as it is."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import Partial, attention, merge
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.masks.sequence import Interval
from regard.mechanisms.base import KV, Mechanism, Pattern
from regard.positions import rotary_angles, rotate, unrotate

POOLS = ("cca", "mean", "max", "last")
CORE_POSITIONS = ("pooled", "last")


class CoreState(NamedTuple):
    """What streaming carries: the near tokens, a core per complete group, and the queries of the open group.

    Attributes:
        near: keys and values of fewer than local_size + group_size tokens.
        core: of all complete groups, with one head per query head.
        query: (B, H, fewer than group_size, D).
        length: tokens seen.
    """

    near: KV
    core: KV
    query: Tensor
    length: int


class CoreContextAttention(Mechanism):
    """Causal attention to a core token per far group and to the near tokens (CCA-Attention, arXiv:2412.12465).

        w_u = softmax(q_{(u+1)g-1} K_uᵀ / √D)          group u: tokens ug .. (u+1)g-1, weighed by its last query
        y_t = softmax(q_t [w_0 K_0 … w_{j-1} K_{j-1}; k_{jg} … k_t]ᵀ / √D) [w_0 V_0 …; v_{jg} … v_t]
        j = max(0, ⌊(t + 1 - s) / g⌋)                  s to s + g - 1 tokens stay as they are

    x (B, N, C) to (B, N, C). One softmax over cores and near tokens, computed as two attentions that are merged
    exactly. No parameters beyond attention's own, and the weights of a model with full attention fit. Equal to full
    attention where g = 1 or N < g + s. Each query head weighs groups for itself, so cores have a head per query head.

    Args:
        dim, num_heads, num_kv_heads, head_dim: C, H and the key heads, dividing H.
        group_size: g.
        local_size: s.
        pool: "cca" as above, or for comparison "mean", "max" (of each channel of keys and values) or "last" (token).
        core_position: "pooled" averages keys with their rotations; "last" averages them unrotated and rotates the core
            to the last position of its group. The paper leaves this open.
        rope_theta: base of the rotary angles; None leaves positions out.
        bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N (N/g + s + g) C)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        group_size: int = 16,
        local_size: int = 1024,
        pool: str = "cca",
        core_position: str = "pooled",
        rope_theta: float | None = None,
        bias: bool = False,
    ):
        super().__init__()
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        _check_arguments(group_size, local_size, pool)
        if core_position not in CORE_POSITIONS:
            raise ArgumentError(f"core_position: expected one of {', '.join(CORE_POSITIONS)}, got {core_position!r}")
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.group_size, self.local_size, self.pool = group_size, local_size, pool
        self.core_position, self.rope_theta = core_position, rope_theta
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._continue(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: CoreState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, CoreState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._continue(x, state, valid)

    def _continue(self, x: Tensor, state: CoreState | None, valid: Tensor | None) -> tuple[Tensor, CoreState]:
        g, s = self.group_size, self.local_size
        past = 0 if state is None else state.length
        total = past + x.shape[1]
        kept, opened = far_groups(past, g, s) * g, past // g * g  # where the near tokens and the open group begin
        q = split_heads(self.q_proj(x), self.num_heads)
        k, v = (split_heads(proj(x), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            q, k = (self._rotate(t, torch.arange(past, total, device=x.device)) for t in (q, k))
        query = q if state is None else torch.cat([state.query, q], 2)
        near = KV.append(None if state is None else state.near, k, v, valid)
        new = self._cores(query, _from(near, opened - kept), opened)
        core = KV.append(None if state is None else state.core, *new)
        y = self.o_proj(merge_heads(_attend(q, near, core, g, s, past, kept)))
        near = _from(near, far_groups(total, g, s) * g - kept)
        return y, CoreState(near, core, query[:, :, total // g * g - opened :], total)

    def _cores(self, q: Tensor, tokens: KV, start: int) -> KV:
        """The cores of the complete groups among tokens, of which the first has position ``start``."""
        if self.core_position == "pooled" or self.rope_theta is None:
            return core_tokens(q, tokens.key, tokens.value, self.group_size, self.pool, tokens.valid)
        positions = torch.arange(start, start + q.shape[2], device=q.device)
        raw = unrotate(tokens.key, *rotary_angles(positions, self.head_dim, self.rope_theta))
        core = core_tokens(q, tokens.key, tokens.value, self.group_size, self.pool, tokens.valid, raw)
        last = positions[self.group_size - 1 :: self.group_size]
        return core._replace(key=self._rotate(core.key, last))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        assert self.rope_theta is not None
        return rotate(x, *rotary_angles(positions, self.head_dim, self.rope_theta))


def cca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    local_size: int,
    *,
    pool: str = "cca",
    valid: Tensor | None = None,
) -> Tensor:
    """Core context aware attention of q (B, H, N, D) to k and v (B, Hk, N, D): (B, H, N, D); causal.

    ``valid`` (B, N) is False at padding, which is left out of the groups; groups are counted in positions.

    Raises:
        ArgumentError: a size below 1 or an unknown pool.
        ShapeError: queries and keys are not of the same tokens.
    """
    _check_arguments(group_size, local_size, pool)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"k: expected the {q.shape[2]} tokens of q, got {tuple(k.shape)}")
    core = core_tokens(q, k, v, group_size, pool, valid)
    return _attend(q, KV(k, v, valid), core, group_size, local_size)


def far_groups(t: int, group_size: int, local_size: int) -> int:
    """How many groups token t sees as cores."""
    return max(0, (t + 1 - local_size) // group_size)


def core_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    pool: str = "cca",
    valid: Tensor | None = None,
    pooled_k: Tensor | None = None,
) -> KV:
    """Keys and values (B, H, N // group_size, D) of the groups' cores; ``pooled_k`` replaces k in what is averaged."""
    batch, heads, n, dim = q.shape
    count = n // group_size
    both = torch.cat([k if pooled_k is None else pooled_k, v], -1)
    if count == 0:
        return KV(q.new_zeros(batch, heads, 0, dim), q.new_zeros(batch, heads, 0, v.shape[-1]))
    q, k, both = (_groups(t, count, group_size) for t in (q, k, both))
    seen = None if valid is None else valid[:, : count * group_size].reshape(-1, group_size)
    if seen is None:
        last = q.new_full((q.shape[0],), group_size - 1, dtype=torch.long)
    else:  # the last token that is no padding
        last = (seen * torch.arange(1, group_size + 1, device=q.device)).argmax(1)
    rows = torch.arange(q.shape[0], device=q.device)
    if pool in ("cca", "mean"):
        query = q[rows, :, last].unsqueeze(2) if pool == "cca" else torch.zeros_like(q[:, :, :1])
        out = attention(query, k, both, mask=None if seen is None else seen[:, None, None])[:, :, 0]
    else:
        if seen is not None:  # padding takes the last token's place, which changes no maximum
            both = torch.where(seen[:, None, :, None], both, both[rows, :, last].unsqueeze(2))
        out = both.amax(2) if pool == "max" else both[rows, :, last]
        out = out.repeat_interleave(heads // out.shape[1], dim=1)
    key, value = out.unflatten(0, (batch, count)).transpose(1, 2).split((dim, v.shape[-1]), -1)
    return KV(key, value, None if seen is None else seen.any(1).view(batch, count))


def _groups(x: Tensor, count: int, group_size: int) -> Tensor:
    """(B, H, N, D) to (B · count, H, group_size, D)."""
    return x[:, :, : count * group_size].unflatten(2, (count, group_size)).transpose(1, 2).flatten(0, 1)


def _attend(q: Tensor, near: KV, core: KV, g: int, s: int, past: int = 0, kept: int = 0) -> Tensor:
    """Queries from position ``past`` to near tokens from position ``kept`` on and to the cores of what is far."""
    parts = [_part(q, near, Near(g, s, past, kept))]
    if far := far_groups(past + q.shape[2] - 1, g, s):
        valid = None if core.valid is None else core.valid[:, :far]
        parts.append(_part(q, KV(core.key[:, :, :far], core.value[:, :, :far], valid), Far(g, s, past)))
    return merge(*parts).out


def _part(q: Tensor, tokens: KV, mask: Interval) -> Partial:
    allowed = mask if tokens.valid is None else mask & masks.padding(tokens.valid)
    return attention(q, tokens.key, tokens.value, mask=allowed, return_lse=True)


def _from(tokens: KV, start: int) -> KV:
    valid = None if tokens.valid is None else tokens.valid[:, start:]
    return KV(tokens.key[:, :, start:], tokens.value[:, :, start:], valid)


@dataclass(frozen=True, repr=False)
class Far(Interval):
    """The cores that token ``past + q`` sees."""

    group_size: int
    local_size: int
    past: int = 0

    def low(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def high(self, q: Tensor) -> Tensor:
        return ((q + self.past + 1 - self.local_size) // self.group_size).clamp(min=0)

    def __repr__(self) -> str:
        return f"far(group_size={self.group_size}, local_size={self.local_size}, past={self.past})"


@dataclass(frozen=True, repr=False)
class Near(Far):
    """The tokens after those cores and up to ``past + q``; keys begin at position ``start``."""

    start: int = 0

    def low(self, q: Tensor) -> Tensor:
        return super().high(q) * self.group_size - self.start

    def high(self, q: Tensor) -> Tensor:
        return q + self.past + 1 - self.start

    def __repr__(self) -> str:
        return super().__repr__().replace("far(", "near(")


def _check_arguments(group_size: int, local_size: int, pool: str) -> None:
    for name, value in (("group_size", group_size), ("local_size", local_size)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    if pool not in POOLS:
        raise ArgumentError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
