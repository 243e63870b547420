"""Aaren: attention with one learned query, evaluated for every prefix."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.linear import PrefixState, prefix_softmax
from regard.mechanisms.base import Mechanism, Pattern


class AarenAttention(Mechanism):
    """Attention as a recurrence (Aaren, arXiv:2405.13956).

        s_j = Wq q · Wk x_j / √D                         one learned query q for all positions, per head
        y_i = Wo Σ_{j≤i} exp(s_j) Wv x_j / Σ_{j≤i} exp(s_j)

    x (B, N, C) to (B, N, C), causal, exact for scores of any size. A token keeps its weight in all later prefixes up
    to normalisation. The state is D + 2 numbers per head, whatever the length; states of disjoint stretches merge like
    `regard.Partial`s. A prefix without a valid token gives the output projection of zeros.

    Args:
        dim, num_heads: C and H, with head_dim D = C / H.
        bias: of the four projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N C²)"
    state: ClassVar = "constant"

    def __init__(self, dim: int, num_heads: int = 8, bias: bool = True):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._attend(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: PrefixState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, PrefixState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._attend(x, state, valid)

    def _attend(self, x: Tensor, state: PrefixState | None, valid: Tensor | None) -> tuple[Tensor, PrefixState]:
        q = self.q_proj(self.query).view(self.num_heads, 1, self.head_dim)
        k, v = (split_heads(proj(x), self.num_heads) for proj in (self.k_proj, self.v_proj))
        scores = (k * q).sum(-1) * self.head_dim**-0.5
        out, state = prefix_softmax(scores, v, valid, state)
        return self.o_proj(merge_heads(out)), state

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "AarenAttention":
        """Weights of ``torch.nn.MultiheadAttention`` under ``mha`` and the learned ``query``."""
        module = cls(official_kwargs["embed_dim"], official_kwargs["num_heads"], official_kwargs.get("bias", True))
        state = dict(state_dict)
        for kind in ("weight", "bias"):
            if (fused := state.pop(f"mha.in_proj_{kind}", None)) is not None:
                state |= {f"{name}_proj.{kind}": part for name, part in zip("qkv", fused.chunk(3), strict=True)}
        module.to(state["query"].dtype)
        load_strictly(module, state, {"mha.out_proj": "o_proj"})
        return module
