"""Attention between channels (DaViT): each channel is a token that holds a view of the whole image."""

from typing import Any, ClassVar

from torch import Tensor, nn

from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import Mechanism, Pattern


class ChannelAttention(Mechanism):
    """Attention of channels to channels, in groups of c (DaViT, arXiv:2204.03645).

        A = softmax(kᵀ v / √c)        out_ni = Σ_j A_ij q_nj        y = out Wo

    A (c, c) is one matrix per group for the whole sequence: every output token depends on every token, in linear time,
    and permuting the tokens permutes the outputs. k plays the query, v the key and q the value; these are the
    published code's names. With ``dynamic_scale``, as in Florence-2, the roles are the usual ones and the scale suits
    any number of tokens: ``A = softmax(qᵀ k / √N)``, ``out_ni = Σ_j A_ij v_nj``.

    x (B, N, C) to (B, N, C), noncausal: A sums over all tokens. Exact.

    Args:
        dim: C.
        num_heads: groups of c = C / num_heads channels.
        qkv_bias: of the query, key and value projections.
        dynamic_scale: see above.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    cost: ClassVar[str] = "O(N C c)"
    causal = False

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, dynamic_scale: bool = False):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        self.dim, self.num_heads, self.dynamic_scale = dim, num_heads, dynamic_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        qkv = self.qkv(x) if valid is None else self.qkv(x) * valid.unsqueeze(-1)
        q, k, v = (split_heads(t, self.num_heads) for t in qkv.chunk(3, -1))
        if self.dynamic_scale:
            count = x.shape[1] if valid is None else valid.sum(1).clamp(min=1)[:, None, None, None]
            weights = ((q * count**-0.5).mT @ k).softmax(-1)
            mixed = v
        else:
            weights = ((k * self.head_dim**-0.5).mT @ v).softmax(-1)
            mixed = q
        return self.proj(merge_heads((weights @ mixed.mT).mT))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "ChannelAttention":
        """The published ``ChannelAttention(dim, num_heads=8, qkv_bias=False)``."""
        module = cls(**{"qkv_bias": False, **official_kwargs})
        load_strictly(module, state_dict)
        return module
