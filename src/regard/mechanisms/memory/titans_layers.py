"""Titans' three ways to combine the neural memory with attention: as context, as gate, as layer."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import attention, merge
from regard.errors import ArgumentError
from regard.layers import merge_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, seen
from regard.mechanisms.memory.titans import MemoryState, NeuralMemory, Weights, check_padding
from regard.mechanisms.softmax import SoftmaxAttention


class _TitansLayer(Mechanism):
    """What the three share: a memory M, softmax attention, persistent tokens P, and the norm in the gate."""

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    state: ClassVar = "constant"
    gated: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None,
        num_persistent: int,
        rope_theta: float | None,
        memory: Mapping[str, Any] | None,
    ):
        super().__init__()
        if num_persistent < 0:
            raise ArgumentError(f"num_persistent: expected at least 0, got {num_persistent}")
        self.dim, self.causal = dim, True
        self.memory = NeuralMemory(dim, **{"chunk_size": 16, **(memory or {})})
        self.attn = SoftmaxAttention(dim, num_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.persistent = nn.Parameter(torch.randn(num_persistent, dim) * 0.02)
        self.norm = nn.RMSNorm(dim) if self.gated else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        check_padding(valid)
        return self._advance(x, None)[0]

    def stream(self, x: Tensor, state: Any = None, *, valid: Tensor | None = None) -> tuple[Tensor, Any]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        check_padding(valid, streaming=True)
        return self._advance(x, state)

    def _advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError


class ContextState(NamedTuple):
    """What memory as context carries along.

    Attributes:
        memory: what has been learned so far.
        before: the memory's weights before the current segment.
        recalled, own: keys and values (B, H, ≤ segment_len, D) of what the last tokens recalled, and their own.
        length: tokens seen.
    """

    memory: MemoryState
    before: Weights
    recalled: KV | None = None
    own: KV | None = None
    length: int = 0


class MemoryAsContext(_TitansLayer):
    """Titans' memory as context, MAC (arXiv:2501.00663). For every segment S of ``segment_len`` tokens:

        h = M*(S)                       recalled with the weights from before the segment
        y = Attn([P; h; S])             softmax attention, P learned tokens
        o = y ∘ sigmoid(norm(M(y)))     M learns from y while it goes

    x (B, N, C) to (B, N, C). Token t of a segment sees P and h, S up to t. The paper writes y to the memory and reads
    it for the whole segment, which shows a token later ones; here token t reads what M has learned up to t.

    Cost O(N segment_len C) and that of the memory, one segment after another. Padding must be at the end, and a stream
    takes none, as in `NeuralMemory`.

    Args:
        dim, num_heads, head_dim: of the attention.
        segment_len: tokens per segment.
        num_persistent: tokens in P.
        rope_theta: base of the rotary angles, of positions in [P; h; S]; None leaves them out.
        memory: arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    cost: ClassVar[str] = "O(N segment_len C + N C²)"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        segment_len: int = 64,
        num_persistent: int = 4,
        rope_theta: float | None = None,
        memory: Mapping[str, Any] | None = None,
    ):
        super().__init__(dim, num_heads, head_dim, num_persistent, rope_theta, memory)
        if segment_len < 1:
            raise ArgumentError(f"segment_len: expected at least 1, got {segment_len}")
        self.segment_len = segment_len

    def _advance(self, x: Tensor, state: ContextState | None) -> tuple[Tensor, ContextState]:
        if state is None:
            start = self.memory.initial_state(x)
            state = ContextState(start, start.weights)
        out = []
        while x.shape[1]:
            room = self.segment_len - state.length % self.segment_len
            y, state = self._within(x[:, :room], state)
            out.append(y)
            x = x[:, room:]
        return torch.cat(out, 1), state

    def _within(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """Tokens of one segment, of which ``start`` were there before."""
        (batch, n, _), start, p = x.shape, state.length % self.segment_len, len(self.persistent)
        before = state.before if start else state.memory.weights
        h = self.memory.read(x, {name: w.unsqueeze(2) for name, w in before.items()})
        prefix = self.persistent.expand(batch, -1, -1)
        _, *always = self.attn.qkv(prefix, prefix)
        _, *new = self.attn.qkv(h, h, p + start)
        q, *own_new = self.attn.qkv(x, x, p + self.segment_len + start)
        recalled = _last(KV.append(state.recalled, *new), self.segment_len)
        own = _last(KV.append(state.own, *own_new), self.segment_len)
        (h_key, h_value), (key, value) = (_last(kv, start + n)[:2] for kv in (recalled, own))
        h_key, h_value = (torch.cat(pair, 2) for pair in zip(always, (h_key, h_value), strict=True))
        far = attention(q, h_key, h_value, mask=masks.causal().shift(p + start), return_lse=True)
        near = attention(q, key, value, mask=masks.causal().shift(start), return_lse=True)
        y = self.attn.o_proj(merge_heads(merge(far, near).out))
        read, memory = self.memory.stream(y, state.memory)
        return y * self.norm(read).sigmoid(), ContextState(memory, before, recalled, own, state.length + n)


class WindowState(NamedTuple):
    """What attention with a window and memory carry along.

    Attributes:
        memory: what has been learned so far.
        kv: keys and values of the persistent tokens and of the last ``window_size - 1`` ones.
        length: tokens seen, the persistent ones included.
    """

    memory: MemoryState
    kv: KV | None = None
    length: int = 0


class _WindowLayer(_TitansLayer):
    """A memory, and attention to P and to the last ``window_size`` tokens, oneself included."""

    cost: ClassVar[str] = "O(N window_size C + N C²)"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        window_size: int = 64,
        num_persistent: int = 4,
        rope_theta: float | None = None,
        memory: Mapping[str, Any] | None = None,
    ):
        super().__init__(dim, num_heads, head_dim, num_persistent, rope_theta, memory)
        if window_size < 1:
            raise ArgumentError(f"window_size: expected at least 1, got {window_size}")
        self.window_size = window_size

    def _advance(self, x: Tensor, state: WindowState | None) -> tuple[Tensor, WindowState]:
        if state is not None:
            return self._mix(x, state)
        y, state = self._mix(
            torch.cat([self.persistent.expand(len(x), -1, -1), x], 1), WindowState(self.memory.initial_state(x))
        )
        return y[:, len(self.persistent) :], state

    def _mix(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        raise NotImplementedError

    def _attend(self, x: Tensor, state: WindowState) -> tuple[Tensor, KV]:
        q, k, v = self.attn.qkv(x, x, state.length)
        past, p = seen(state.kv), len(self.persistent)
        kv = KV.append(state.kv, k, v)
        near = masks.sliding_window(self.window_size).shift(past)
        y = attention(q, kv.key, kv.value, mask=masks.causal().shift(past) & (near | masks.sinks(p) if p else near))
        keep = min(self.window_size - 1, past + x.shape[1] - p)
        key, value = (torch.cat([t[:, :, :p], t[:, :, t.shape[2] - keep :]], 2) for t in kv[:2])
        return self.attn.o_proj(merge_heads(y)), KV(key, value)


class MemoryAsGate(_WindowLayer):
    """Titans' memory as gate, MAG (arXiv:2501.00663): attention and memory side by side, on x~ = [P; x].

        y = SW-Attn(x~)                 the last ``window_size`` tokens and, always, P
        o = y ∘ sigmoid(norm(M(x~)))

    x (B, N, C) to (B, N, C), causal. Cost O(N window_size C) and that of the memory. Padding must be at the end, and a
    stream takes none, as in `NeuralMemory`.

    Args:
        dim, num_heads, head_dim: of the attention.
        window_size: see only the last so many tokens.
        num_persistent: tokens in P, learned.
        rope_theta: base of the rotary angles; None leaves positions out.
        memory: arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    def _mix(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        y, kv = self._attend(x, state)
        read, memory = self.memory.stream(x, state.memory)
        return y * self.norm(read).sigmoid(), WindowState(memory, kv, state.length + x.shape[1])


class MemoryAsLayer(_WindowLayer):
    """Titans' memory as layer, MAL (arXiv:2501.00663): attention reads what the memory gives.

        y = M([P; x])
        o = SW-Attn(y)                  the last ``window_size`` tokens and, always, those of P

    x (B, N, C) to (B, N, C), causal. Cost and padding as in `MemoryAsGate`.

    Args:
        dim, num_heads, head_dim: of the attention.
        window_size: see only the last so many tokens.
        num_persistent: tokens in P, learned.
        rope_theta: base of the rotary angles; None leaves positions out.
        memory: arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    gated: ClassVar[bool] = False

    def _mix(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        read, memory = self.memory.stream(x, state.memory)
        y, kv = self._attend(read, state)
        return y, WindowState(memory, kv, state.length + x.shape[1])


def _last(kv: KV, n: int) -> KV:
    return KV(kv.key[:, :, -n:], kv.value[:, :, -n:])
