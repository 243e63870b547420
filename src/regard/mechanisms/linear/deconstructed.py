"""Deconstructed attention: replacements that each give up one principle of it (arXiv:2510.11602)."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ShapeError
from regard.layers import SwiGLU, merge_heads, per_head, split_heads
from regard.linear import PrefixState, normalized_linear_attention, prefix_softmax, taylor
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible
from regard.mechanisms.softmax import SoftmaxAttention
from regard.positions import rotate_tokens


class TaylorAttention(Mechanism):
    """Attention with the exponential's first terms, "Approximate" (arXiv:2510.11602, the feature of arXiv:2402.18668).

        A_ij ∝ 1 + s_ij + s_ij²/2,  s_ij = q_i·k_j / √D,  j ≤ i        y = Wo [Σ_j A_ij v_j]_h

    x (B, N, C) to (B, N, C). Keeps mixing and dependence on the sequence, gives up the softmax's form: a linear
    attention whose features have 1 + D + D² channels, computed exactly. Causal or noncausal.

    Args:
        dim: C.
        num_heads: H.
        bias: of the query, key and value projections.
        rope_theta: base of the rotary angles, None for none.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N C D²)"
    state: ClassVar = "constant"

    def __init__(
        self, dim: int, num_heads: int = 8, bias: bool = True, rope_theta: float | None = None, causal: bool = True
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        self.dim, self.num_heads, self.rope_theta = dim, num_heads, rope_theta
        self.causal = legitimate(self, causal)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._attend(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: tuple[Tensor, int] | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, int]]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._attend(x, state, valid)

    def _attend(
        self, x: Tensor, state: tuple[Tensor, int] | None, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, int]]:
        sums, past = state if state is not None else (None, 0)
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past)
        out, sums = taylor_attention(q, k, v, causal=self.causal, valid=valid, state=sums)
        return self.o_proj(merge_heads(out)), (sums, past + x.shape[1])


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    valid: Tensor | None = None,
    state: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Weights ``1 + s + s²/2`` divided by their sum + 1e-6; q, k, v (B, H, N, D) to (B, H, N, E) and the state."""
    return normalized_linear_attention(
        taylor(q * q.shape[-1] ** -0.5), taylor(k), v, causal=causal, valid=valid, state=state, form=form
    )


class KeyGatedAttention(Mechanism):
    """Weights from each key's own position, "Non-approximate" (arXiv:2510.11602).

        l_j = Σ_c SiLU(q_j)_c k_jc / √D        A_ij = exp(l_j) / Σ_{j'≤i} exp(l_j')        y = Wo [Σ_j A_ij v_j]_h

    Gives up the comparison of queries with keys: a token weighs the same for all later ones, up to normalisation.
    x (B, N, C) to (B, N, C), causal, exact, without positions. Alone in all layers it is expected not to train (logits
    grow); in hybrids it does.

    Args:
        dim, num_heads: C and H.
        bias: of the query, key and value projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N C²)"
    state: ClassVar = "constant"

    def __init__(self, dim: int, num_heads: int = 8, bias: bool = True):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._attend(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: PrefixState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, PrefixState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._attend(x, state, valid)

    def _attend(self, x: Tensor, state: PrefixState | None, valid: Tensor | None) -> tuple[Tensor, PrefixState]:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out, state = key_gated_attention(q, k, v, valid=valid, state=state)
        return self.o_proj(merge_heads(out)), state


def key_gated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: PrefixState | None = None
) -> tuple[Tensor, PrefixState]:
    """`KeyGatedAttention` of q, k (B, H, N, D) and v (B, H, N, E)."""
    return prefix_softmax((F.silu(q) * k).sum(-1) * q.shape[-1] ** -0.5, v, valid, state)


class GatedMLPMixer(Mechanism):
    """No mixing at all, "MLP" (arXiv:2510.11602): ``Wdn (SiLU(Wgt x) ∘ Wup x)``, every token by itself.

    x (B, N, C) to (B, N, C). As many weights as attention's four matrices have, up to rounding.

    Args:
        dim: C.
        causal: either; tokens see only themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N C²)"
    state: ClassVar = "constant"

    def __init__(self, dim: int, causal: bool = True):
        super().__init__()
        self.dim, self.causal = dim, legitimate(self, causal)
        self.mlp = SwiGLU(dim, round(4 * dim / 3))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self.mlp(x)

    def stream(self, x: Tensor, state: None = None, *, valid: Tensor | None = None) -> tuple[Tensor, None]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self.mlp(x), None


class DecoupledQKAttention(SoftmaxAttention):
    """Attention whose queries and keys come from elsewhere than the layer's input (arXiv:2510.11602).

        A = softmax(q kᵀ / √D), q, k = s Wq, s Wk        y = Wo [A x Wv]_h

    The source s may be the same for every sequence ("FixedSeqQK", "RndEmbQK") or the token embeddings of this one
    ("StaticEmbQK"); `regard.models.language.deconstructed.DeconstructedLM` supplies it. Without one it is x, and this
    is `SoftmaxAttention`, whose arguments it has.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:
        """As `Mechanism.forward`, with ``source`` (B or 1, N, C)."""
        self._check(x, context, valid, dim=self.dim)
        mask = visible(x.shape[1], self.causal, valid, window_size=self.window_size)
        q, k, v = self._decoupled(x, source, 0)
        return self.o_proj(merge_heads(attention(q, k, v, mask=mask)))

    def stream(
        self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None, source: Tensor | None = None
    ) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self._decoupled(x, source, past)
        state = KV.append(state, k, v, valid)
        mask = visible(x.shape[1], True, state.valid, past, self.window_size)
        return self.o_proj(merge_heads(attention(q, state.key, state.value, mask=mask))), state

    def _decoupled(self, x: Tensor, source: Tensor | None, past: int) -> tuple[Tensor, Tensor, Tensor]:
        if source is not None and (source.shape[0] not in (1, x.shape[0]) or source.shape[1:] != x.shape[1:]):
            raise ShapeError(
                f"source: expected (1 or {x.shape[0]}, {x.shape[1]}, {self.dim}), got {tuple(source.shape)}"
            )
        q, k, _ = self.qkv(x if source is None else source, x if source is None else source, past)
        q, k = (t.expand(x.shape[0], -1, -1, -1) for t in (q, k))
        return q, k, split_heads(self.v_proj(x), self.num_kv_heads)

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "DecoupledQKAttention":
        """Llama-style weights, as `SoftmaxAttention` loads them."""
        module = super().from_official(state_dict, **official_kwargs)
        assert isinstance(module, cls)
        return module
