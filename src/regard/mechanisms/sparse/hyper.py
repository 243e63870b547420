"""HyperAttention: large entries found by hashing, the rest estimated from a sample of the keys."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.attention import Partial, attention, merge
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import merge_heads, per_head, split_heads
from regard.mechanisms.base import Mechanism, Pattern
from regard.positions import rotate_tokens

Samples = Iterator[Tensor] | torch.Generator | None  # given indices, or where random ones come from


class HyperAttention(nn.Module):
    """Near-linear estimate of softmax attention (arXiv:2310.05869) for queries, keys and values of heads.

        sort q and k by the Gray code of sign(x P)              near vectors get near codes
        exact: block i of sorted q against block i of sorted k
        estimated: m sampled keys stand for all M, with lse + ln(M / m)
        out = merge(exact, estimated)

    Causal: both halves causally (recursively), and the second half against the first as above; which keys a query meets
    then depends on later queries too, though their values stay hidden. Below ``min_seq_len``
    attention is exact. Approximate otherwise; more blocks and samples come closer. Cost O(N (c + m) D) for blocks of c,
    times log(N / min_seq_len) if causal.

    Args:
        head_dim: D.
        num_projections: r, bits of the hash.
        block_size: c.
        sample_size: m; 0 leaves the estimate out.
        min_seq_len: lengths up to which (noncausal: below which) attention is exact.
        mask_padding: leave zeros that fill up the last block out of the softmax, as is right; False is as published.
        mask_samples: leave sampled keys of a query's own block out of the estimate, so that they do not count twice, as
            the paper says; False is what the published code does in float32.
        merge_eps: added inside the logarithm where two lse are joined, as published; exact without.
        seed: of the projection and of the samples, which are the same in every call; None draws others in each.
    """

    projection: Tensor

    def __init__(
        self,
        head_dim: int = 64,
        num_projections: int = 7,
        block_size: int = 256,
        sample_size: int = 256,
        min_seq_len: int = 4096,
        mask_padding: bool = True,
        mask_samples: bool = True,
        merge_eps: float = 0.0,
        seed: int | None = 0,
    ):
        super().__init__()
        for name, value, least in (
            ("num_projections", num_projections, 1),
            ("block_size", block_size, 1),
            ("sample_size", sample_size, 0),
            ("min_seq_len", min_seq_len, 1),
        ):
            if value < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {value}")
        self.block_size, self.sample_size, self.min_seq_len = block_size, sample_size, min_seq_len
        self.mask_padding, self.mask_samples, self.merge_eps = mask_padding, mask_samples, merge_eps
        self.seed = seed
        self.register_buffer("projection", torch.randn(head_dim, num_projections, generator=self._generator()))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        samples: list[Tensor] | None = None,
    ) -> Partial:
        """q (B, H, N, D), k (B, H, M, D), v (B, H, M, E) to a `Partial` with an estimated lse.

        ``samples``, index tensors (B, H·2^level, m) in the order of use, innermost level first, replace random ones.
        """
        if q.dim() != 4 or k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
            raise ShapeError(f"q, k, v: expected the same batch and heads, got {[tuple(t.shape) for t in (q, k, v)]}")
        if causal and q.shape[2] != k.shape[2]:
            raise ShapeError(f"k: causal attention needs as many keys as queries, {q.shape[2]}, got {k.shape[2]}")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        draws: Samples = self._generator() if samples is None else iter(samples)
        return self._causal(q, k, v, scale, draws) if causal else self._full(q, k, v, scale, draws)

    def _generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def hash(self, x: Tensor) -> Tensor:
        """(..., D) to integers (...): the place of the sign pattern in the Gray sequence."""
        bits = (x @ self.projection.to(x.dtype) > 0).long()
        code = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
        return code ^ (code >> 1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, scale: float, samples: Samples) -> Partial:
        n = q.shape[2]
        if n <= self.min_seq_len:
            return attention(q, k, v, mask=masks.causal(), scale=scale, return_lse=True)
        odd = n % 2
        q, k, v = (F.pad(t, (0, 0, 0, odd)) for t in (q, k, v))
        half = q.shape[2] // 2
        # the halves as more heads: (B, 2H, N/2, ·)
        q2, k2, v2 = (t.unflatten(2, (2, half)).flatten(1, 2) for t in (q, k, v))
        near = self._causal(q2, k2, v2, scale, samples)
        out, lse = near.out.unflatten(1, (-1, 2)), near.lse.unflatten(1, (-1, 2))
        far = self._full(q[:, :, half:], k[:, :, :half], v[:, :, :half], scale, samples)
        second = self._join(Partial(out[:, :, 1], lse[:, :, 1]), far)
        whole = torch.cat([out[:, :, 0], second.out], 2), torch.cat([lse[:, :, 0], second.lse], 2)
        return Partial(whole[0][:, :, :n], whole[1][:, :, :n])

    def _full(self, q: Tensor, k: Tensor, v: Tensor, scale: float, samples: Samples) -> Partial:
        n, m = q.shape[2], k.shape[2]
        if n < self.min_seq_len:
            return attention(q, k, v, scale=scale, return_lse=True)
        order_q, order_k = (self.hash(t.detach()).argsort(dim=2, stable=True) for t in (q, k))
        q, k, v = _take(q, order_q), _take(k, order_k), _take(v, order_k)
        result, rows = self._blocks(q, k, v, scale)
        if self.sample_size and n > rows and m > self.block_size:
            result = self._join(result, self._sampled(q, k, v, scale, rows, samples))
        back = order_q.argsort(dim=2)
        return Partial(_take(result.out, back), result.lse.gather(2, back))

    def _join(self, first: Partial, second: Partial) -> Partial:
        joined = merge(first, second)
        if not self.merge_eps:
            return joined
        share = (first.lse - joined.lse).exp()
        return Partial(joined.out, first.lse - (share + self.merge_eps).log())

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Partial, int]:
        """Sorted queries against the key block of the same number, and how many queries a block has."""
        n, m = q.shape[2], k.shape[2]
        count = -(-m // self.block_size)
        rows = -(-n // count)
        k, v = (F.pad(t, (0, 0, 0, count * self.block_size - m)) for t in (k, v))
        q = F.pad(q, (0, 0, 0, count * rows - n))
        cut = (t.unflatten(2, (count, -1)).flatten(1, 2) for t in (q, k, v))
        mask = None
        if self.mask_padding and count * self.block_size > m:
            real = torch.arange(count * self.block_size, device=q.device).view(count, 1, -1) < m
            mask = real.repeat(q.shape[1], 1, 1)  # (H · blocks, 1, c), heads outside
        out, lse = attention(*cut, mask=mask, scale=scale, return_lse=True)
        out, lse = out.unflatten(1, (-1, count)).flatten(2, 3), lse.unflatten(1, (-1, count)).flatten(2, 3)
        return Partial(out[:, :, :n], lse[:, :, :n]), rows

    def _sampled(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int, samples: Samples) -> Partial:
        m = k.shape[2]
        if isinstance(samples, Iterator):
            index = next(samples)
        else:
            index = torch.randint(m, (*k.shape[:2], self.sample_size), generator=samples).to(k.device)
        mask = None
        if self.mask_samples:
            own = torch.arange(q.shape[2], device=q.device) // rows
            mask = own[:, None] != (index // self.block_size).unsqueeze(2)
        out, lse = attention(q, _take(k, index), _take(v, index), mask=mask, scale=scale, return_lse=True)
        return Partial(out, lse + math.log(m / index.shape[2]))


class HyperSelfAttention(Mechanism):
    """Multi-head self-attention estimated by `HyperAttention` (arXiv:2310.05869).

    x (B, N, C) to (B, N, C). Below ``min_seq_len`` tokens it is exact softmax attention; beyond, large scores are found
    by hashing and the rest is estimated from sampled keys. Noncausal: the causal form of `HyperAttention` hides the
    values of later tokens, but which keys a query meets depends on the order of all queries, later ones included, so
    it is left to those who know their use of it (the paper patches prompts of pretrained models).

    Args:
        dim, num_heads: C and H, with head_dim C / H.
        num_projections, block_size, sample_size, min_seq_len, seed: see `HyperAttention`.
        rope_theta: base of rotary angles; None for none.
        bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "cross"})
    cost: ClassVar[str] = "O(N (block_size + sample_size) C)"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_projections: int = 7,
        block_size: int = 256,
        sample_size: int = 256,
        min_seq_len: int = 4096,
        rope_theta: float | None = None,
        bias: bool = False,
        seed: int | None = 0,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, False
        self.rope_theta = rope_theta
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        settings: dict[str, Any] = {"block_size": block_size, "sample_size": sample_size, "min_seq_len": min_seq_len}
        self.attend = HyperAttention(self.head_dim, num_projections, seed=seed, **settings)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        if valid is not None and not bool(valid.all()):
            raise Unsupported("valid: padding would take part in hashing and sampling; cut sequences to their length")
        source = x if context is None else context
        q = split_heads(self.q_proj(x), self.num_heads)
        k, v = (split_heads(proj(source), self.num_heads) for proj in (self.k_proj, self.v_proj))
        q, k = rotate_tokens(q, self.rope_theta), rotate_tokens(k, self.rope_theta)
        return self.o_proj(merge_heads(self.attend(q, k, v).out))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, H, n) of x (B, H, N, D)."""
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
