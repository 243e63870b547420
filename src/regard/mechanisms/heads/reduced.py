"""Attention with fewer matrices: query and key merged or symmetric, value and output merged or left out."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import merge_heads, per_head, split_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible

QK = Literal["separate", "merged", "symmetric", "cholesky"]
VO = Literal["full", "merged", "none"]


class ReducedAttention(Mechanism):
    """The attention of "Reducing the Transformer Architecture to a Minimum" (arXiv:2410.13732).

        z = softmax(S / √D + mask) x Wv Wo, D = C / H, with scores S and the matrices after the softmax chosen freely:

        qk = separate    x Wq (x Wk)ᵀ per head          2 C²            vo = full      x Wv Wo              2 C²
             merged      x Wqk xᵀ, one head             C²                   merged    x Wvo, one head      C²
             symmetric   x Wq (x Wq)ᵀ per head          C²                   none      x, mean over heads   0
             cholesky    x T Tᵀ xᵀ, T lower triangular  C (C + 1) / 2

    ``merged`` computes the same functions as ``separate`` with one head (`merge_qk`), and likewise for value and output
    (`merge_vo`). With ``symmetric`` and ``cholesky`` S is positive semi-definite, so a token's similarity with itself
    is never negative. With ``none`` every output is a convex combination of the inputs; the paper has one head there,
    and the mean over several is our choice.

    x (B, N, C) to (B, N, C). Exact. Cost O(N² C), the key and value of merged forms being x itself.

    Args:
        dim: C.
        num_heads: H; 1 for the merged forms and cholesky.
        qk: how tokens are compared.
        vo: what is summed.
        bias: of the matrices there are.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qk: QK = "separate",
        vo: VO = "full",
        bias: bool = False,
        causal: bool = True,
    ):
        super().__init__()
        for name, value, known in (("qk", qk, QK.__args__), ("vo", vo, VO.__args__)):  # type: ignore[attr-defined]
            if value not in known:
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
            if num_heads > 1 and value in ("merged", "cholesky"):
                raise ArgumentError(f"num_heads: {name}={value!r} is defined for one head, got {num_heads}")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.head_dim, _ = per_head(dim, num_heads)
        self.qk, self.vo, self.bias = qk, vo, bias
        self.q_proj = Triangular(dim, bias) if qk == "cholesky" else nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias) if qk == "separate" else None
        self.v_proj = nn.Linear(dim, dim, bias=bias) if vo == "full" else None
        self.o_proj = None if vo == "none" else nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        state = self._keys(x if context is None else context, None, valid)
        return self._mix(x, state, 0)

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        state = self._keys(x, state, valid)
        return self._mix(x, state, past), state

    def scores(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """S (B, H, N, M), before scaling and softmax; for looking at, nothing here needs it."""
        self._check(x, context, dim=self.dim)
        keys = self._keys(x if context is None else context, None, None).key
        return split_heads(self.q_proj(x), self.num_heads) @ keys.mT

    def _keys(self, source: Tensor, state: KV | None, valid: Tensor | None) -> KV:
        project = self.q_proj if self.k_proj is None else self.k_proj
        key = source.unsqueeze(1) if self.qk == "merged" else split_heads(project(source), self.num_heads)
        value = source.unsqueeze(1) if self.v_proj is None else split_heads(self.v_proj(source), self.num_heads)
        return KV.append(state, key, value, valid)

    def _mix(self, x: Tensor, state: KV, past: int) -> Tensor:
        query = split_heads(self.q_proj(x), self.num_heads)
        value = state.value.expand(-1, self.num_heads, -1, -1)
        out = attention(query, state.key, value, mask=visible(x.shape[1], self.causal, state.valid, past))
        if self.o_proj is None:
            return out.mean(1)
        return self.o_proj(merge_heads(out))


class Triangular(nn.Module):
    """``x T + b`` with T lower triangular, C (C + 1) / 2 numbers; T Tᵀ starts with spectral norm 1."""

    def __init__(self, dim: int, bias: bool = False):
        super().__init__()
        start = torch.randn(dim, dim).tril()
        start /= torch.linalg.matrix_norm(start, 2)
        self.register_buffer("index", torch.tril_indices(dim, dim), persistent=False)
        self.entries = nn.Parameter(start[tuple(torch.tril_indices(dim, dim))].clone())
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.dim = dim

    def matrix(self) -> Tensor:
        """T (C, C)."""
        rows, columns = self.index  # type: ignore[misc]
        return self.entries.new_zeros(self.dim, self.dim).index_put((rows, columns), self.entries)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix()
        return y if self.bias is None else y + self.bias


def merge_qk(layer: ReducedAttention) -> ReducedAttention:
    """The same function with one matrix Wqk = Wq Wkᵀ in place of two; exact, biases included.

    Of the key's bias only terms equal for all keys would remain, which the softmax takes out.

    Raises:
        ArgumentError: query and key are not separate, or there are several heads.
    """
    if layer.qk != "separate" or layer.num_heads != 1:
        raise ArgumentError(f"layer: expected qk='separate' with one head, got {layer.qk!r} with {layer.num_heads}")
    assert layer.k_proj is not None
    assert isinstance(layer.q_proj, nn.Linear)
    state = {name: t for name, t in layer.state_dict().items() if not name.startswith(("q_proj", "k_proj"))}
    state["q_proj.weight"] = layer.k_proj.weight.mT @ layer.q_proj.weight
    if layer.bias:
        state["q_proj.bias"] = layer.k_proj.weight.mT @ layer.q_proj.bias
    return _like(layer, state, qk="merged", vo=layer.vo)


def merge_vo(layer: ReducedAttention) -> ReducedAttention:
    """The same function with one matrix Wvo = Wv Wo in place of two; exact, biases included.

    Raises:
        ArgumentError: there is no value or output matrix, or there are several heads.
    """
    if layer.vo != "full" or layer.num_heads != 1:
        raise ArgumentError(f"layer: expected vo='full' with one head, got {layer.vo!r} with {layer.num_heads}")
    assert layer.v_proj is not None
    assert layer.o_proj is not None
    state = {name: t for name, t in layer.state_dict().items() if not name.startswith(("v_proj", "o_proj"))}
    state["o_proj.weight"] = layer.o_proj.weight @ layer.v_proj.weight
    if layer.bias:  # the weights of a row sum to one, so the value's bias arrives as it is
        state["o_proj.bias"] = layer.o_proj.weight @ layer.v_proj.bias + layer.o_proj.bias
    return _like(layer, state, qk=layer.qk, vo="merged")


def _like(layer: ReducedAttention, state: dict[str, Tensor], qk: QK, vo: VO) -> ReducedAttention:
    merged = ReducedAttention(layer.dim, 1, qk, vo, layer.bias, layer.causal)
    merged = merged.to(next(iter(layer.parameters()))).train(layer.training)
    merged.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return merged


def overdetermination(num_examples: int, num_outputs: int, num_parameters: int) -> float:
    """Q = K M / P: how many numbers are to be explained per parameter; below 1 a model may learn by heart."""
    if num_parameters < 1:
        raise ArgumentError(f"num_parameters: expected at least 1, got {num_parameters}")
    return num_examples * num_outputs / num_parameters
