"""Key-driven grouped-query attention: how many query heads a key head serves follows from the keys."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible

SCHEMES = ("gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa")


class KeyDrivenGQA(Mechanism):
    """Grouped-query attention with unequal groups (arXiv:2408.08454).

        s_g = Σ_batch ‖k_g‖_F                                            magnitude of each key head
        "kdgqa":      a ∝ (s - min s) / (max s - min s)                  in every forward
        "dgqa_diff":  a ∝ |c - s|,  "dgqa_ema": a ∝ β s + (1 - β) c      every ``window_size`` training steps
        "pgqa":       equal groups, standardised noise is subtracted from their outputs
        "gqa":        equal groups
        y = Wo [softmax(q_h k_gᵀ / √D) v_g]_h                            the first a_1 heads use g = 1, and so on

    x (B, N, C) to (B, N, C). Allocations a are rounded to whole heads that sum to H; c is a buffer of earlier
    magnitudes. They depend on the whole batch and on all tokens, so causal use needs equal or fixed groups
    (``allocation``), and fixed ones are better for inference too. Nothing is learned through the allocation.

    Args:
        dim, num_heads, num_kv_heads: C, H and the number G of key heads, dividing H.
        qkv_bias: of the query, key and value projections.
        scheme: see above.
        allocation: fixed numbers of query heads, one per key head, in place of what the scheme would say.
        window_size: training steps between two allocations of the "dgqa" schemes.
        beta: weight of the present magnitudes in "dgqa_ema".
        causal: whether tokens see only earlier ones and themselves.
        seed: of the random repairs of "dgqa" and the noise of "pgqa".
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"
    example: ClassVar[dict[str, Any]] = {"num_kv_heads": 2, "allocation": [3, 1], "causal": True}
    magnitudes: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        scheme: str = "kdgqa",
        allocation: list[int] | None = None,
        window_size: int = 300,
        beta: float = 0.9,
        causal: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        num_kv_heads = max(1, num_heads // 2) if num_kv_heads is None else num_kv_heads
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, None, num_kv_heads)
        if scheme not in SCHEMES:
            raise ArgumentError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
        if allocation is not None and (
            len(allocation) != num_kv_heads or sum(allocation) != num_heads or min(allocation) < 0
        ):
            raise ArgumentError(
                f"allocation: expected {num_kv_heads} numbers of heads that sum to {num_heads}, got {allocation}"
            )
        if causal and scheme != "gqa" and allocation is None:
            raise Unsupported(f"causal: scheme {scheme!r} looks at all tokens; give a fixed allocation or scheme='gqa'")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.scheme, self.fixed, self.window_size, self.beta = scheme, allocation, window_size, beta
        self.generator = torch.Generator().manual_seed(seed)
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(dim, dim)
        if scheme.startswith("dgqa"):
            self.register_buffer("magnitudes", torch.zeros(num_kv_heads))
        self.steps = 0
        self.last_allocation = (
            equal_allocation(num_heads, num_kv_heads) if allocation is None else torch.tensor(allocation)
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        noise: list[Tensor] | None = None,
    ) -> Tensor:
        """See `Mechanism.forward`; ``noise``, one (B, H/G, N·D) per group, replaces what "pgqa" would draw."""
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self._qkv(x)
        if self.fixed is None and self.scheme not in ("gqa", "pgqa"):
            self._allocate(key_magnitudes(k, valid))
        out = grouped_attention(q, k, v, self.last_allocation, visible(x.shape[1], self.causal, valid))
        if self.scheme == "pgqa":
            groups = out.chunk(self.num_kv_heads, dim=1)
            drawn = [output_noise(group, self.generator) for group in groups] if noise is None else noise
            out = torch.cat([o - n.view(o.shape) for o, n in zip(groups, drawn, strict=True)], dim=1)
        return self.o_proj(merge_heads(out))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self._qkv(x)
        state = KV.append(state, k, v, valid)
        mask = visible(x.shape[1], True, state.valid, past)
        out = grouped_attention(q, state.key, state.value, self.last_allocation, mask)
        return self.o_proj(merge_heads(out)), state

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = split_heads(self.q_proj(x), self.num_heads)
        return q, split_heads(self.k_proj(x), self.num_kv_heads), split_heads(self.v_proj(x), self.num_kv_heads)

    def _allocate(self, magnitudes: Tensor) -> None:
        if self.scheme == "kdgqa":
            self.last_allocation = allocate_by_norm(magnitudes, self.num_heads)
            return
        due = not self.training or self.steps % self.window_size == 0
        self.steps += self.training
        if not due:
            return
        earlier = self.magnitudes.to(magnitudes.dtype)
        weights = (earlier - magnitudes).abs()
        if self.scheme == "dgqa_ema":
            weights = self.beta * magnitudes + (1 - self.beta) * earlier
        self.last_allocation = allocate_by_weight(weights, self.num_heads, "random", self.generator)
        # the published code divides by the window here, which is no running mean but what it does
        self.magnitudes.copy_((earlier + magnitudes) / self.window_size if self.training else magnitudes)

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, variant: str = "kdgqa", **official_kwargs: Any
    ) -> "KeyDrivenGQA":
        """The modules of ``modules/attention``; ``variant`` is the scheme."""
        module = cls(scheme=variant, **official_kwargs)
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj", "cache": "magnitudes"}
        load_strictly(module, state_dict, names)
        return module


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, allocation: Tensor, mask: Any = None) -> Tensor:
    """Softmax attention in which key head g serves ``allocation[g]`` query heads in a row, perhaps none.

    q (B, H, N, D), k and v (B, G, M, D), allocation (G,) integers that sum to H; to (B, H, N, D).
    """
    if int(allocation.sum()) != q.shape[1]:
        raise ShapeError(f"allocation: expected numbers that sum to {q.shape[1]}, got {allocation.tolist()}")
    repeats = allocation.to(k.device)
    k, v = (t.repeat_interleave(repeats, dim=1, output_size=q.shape[1]) for t in (k, v))
    return attention(q, k, v, mask=mask)


def key_magnitudes(k: Tensor, valid: Tensor | None = None) -> Tensor:
    """(G,): for each head the sum over the batch of the Frobenius norms of its keys (B, G, N, D)."""
    k = k.detach()
    if valid is not None:
        k = k * valid[:, None, :, None]
    return k.flatten(2).norm(dim=2).sum(0)


def equal_allocation(num_heads: int, groups: int) -> Tensor:
    """(G,) with ``num_heads / groups`` everywhere."""
    return torch.full((groups,), num_heads // groups)


def allocate_by_norm(magnitudes: Tensor, num_heads: int) -> Tensor:
    """Heads in proportion to magnitudes (G,) scaled to 0..1; surplus comes off the largest, lack goes to the smallest.

    Equal magnitudes give equal groups.
    """
    low, high = magnitudes.min(), magnitudes.max()
    if low == high:
        return equal_allocation(num_heads, len(magnitudes))
    scaled = (magnitudes - low) / (high - low)
    return _repaired((scaled / scaled.sum() * num_heads).round().long(), num_heads, "greedy", None)


def allocate_by_weight(
    weights: Tensor, num_heads: int, repair: str = "random", generator: torch.Generator | None = None
) -> Tensor:
    """Heads in proportion to weights (G,) of at least zero; ``repair`` is "random" (published) or "greedy"."""
    if not bool(weights.sum() > 0):
        return equal_allocation(num_heads, len(weights))
    return _repaired((weights / weights.sum() * num_heads).round().long(), num_heads, repair, generator)


def _repaired(allocation: Tensor, num_heads: int, repair: str, generator: torch.Generator | None) -> Tensor:
    """The allocation with single heads added or taken until they are ``num_heads``."""
    allocation = allocation.cpu()
    while (rest := num_heads - int(allocation.sum())) != 0:
        if repair == "greedy":
            index = int(allocation.argmin() if rest > 0 else allocation.argmax())
        else:
            index = int(torch.randint(len(allocation), (), generator=generator))
        if rest > 0 or allocation[index] > 0:
            allocation[index] += 1 if rest > 0 else -1
    return allocation


def output_noise(out: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise in the shape of a group's outputs (B, a, N, D), with the mean and deviation of each of its rows.

    One draw (a, N·D) for all items, zero at (i, i), standardised per row, then scaled to each item's row.
    """
    rows = out.flatten(2)
    noise = torch.rand(rows.shape[1:], generator=generator).to(rows)
    noise.fill_diagonal_(0.0)
    spread = noise.std(dim=1, keepdim=True)
    noise = (noise - noise.mean(dim=1, keepdim=True)) / torch.where(spread == 0, 1.0, spread)
    return noise * rows.std(dim=2, keepdim=True) + rows.mean(dim=2, keepdim=True)


def mean_pool_kv_heads(weight: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """The key or value weights (H·D, C) or bias (H·D,) of a trained multi-head attention, averaged over each group."""
    return weight.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1)).mean(1).flatten(0, 1)
