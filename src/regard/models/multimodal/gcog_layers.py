"""What the small readers of rules and scenes (`regard.models.multimodal.gcog`) are made of."""

import math
import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, merge_heads, per_head, split_heads, split_rows
from regard.layers.dropout import dropout_attention
from regard.masks import Mask, causal
from regard.mechanisms.base import visible

Positions = Literal["absolute", "relative"]


class Tokens(NamedTuple):
    """x (B, N, C), their positions (B, N), and which are no padding (B, N), None for all."""

    x: Tensor
    positions: Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, x: Tensor, valid: Tensor | None = None) -> "Tokens":
        """Positions are counted along those that are no padding."""
        counted = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if valid is None else valid.long()
        return cls(x, (counted.cumsum(1) - 1).clamp(min=0), valid)

    @classmethod
    def nonzero(cls, x: Tensor) -> "Tokens":
        """The rows that are not all zeros, at the positions they have; shorter examples are filled up at the end."""
        valid = x.ne(0).any(-1)
        count = valid.sum(1)
        order = valid.sort(stable=True, dim=1, descending=True).indices[:, : max(1, int(count.max()))]
        kept = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        padding = torch.arange(order.shape[1], device=x.device) >= count[:, None]
        return cls(kept, order, ~padding if bool(padding.any()) else None)

    def followed_by(self, other: "Tokens") -> "Tokens":
        """One sequence; positions of the other are counted on from these."""
        length = self.positions.amax(1, keepdim=True) + 1
        marks = [t.x.new_ones(t.x.shape[:2], dtype=torch.bool) if t.valid is None else t.valid for t in (self, other)]
        return Tokens(
            torch.cat([self.x, other.x], 1),
            torch.cat([self.positions, other.positions + length], 1),
            None if self.valid is None and other.valid is None else torch.cat(marks, 1),
        )

    @property
    def last(self) -> Tensor:
        """The last one that is no padding, (B, C)."""
        if self.valid is None:
            return self.x[:, -1]
        at = (self.valid * torch.arange(1, self.x.shape[1] + 1, device=self.x.device)).argmax(1)
        return self.x[torch.arange(len(self.x), device=self.x.device), at]


class Attention(nn.Module):
    """Attention of x (B, N, dim) to a context (B, M, context_dim), in heads of ``dim / num_heads``."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        per_head(dim, num_heads)
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj, self.v_proj = nn.Linear(context_dim, dim), nn.Linear(context_dim, dim)

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        q = split_heads(self.q_proj(x), self.num_heads)
        k, v = (split_heads(proj(context), self.num_heads) for proj in (self.k_proj, self.v_proj))
        mask = visible(x.shape[1], False, valid)
        return self.o_proj(merge_heads(dropout_attention(q, k, v, self.dropout if self.training else 0.0, mask)))


class RelativeAttention(nn.Module):
    """Causal attention with a vector per distance (arXiv:1809.04281), and no output projection.

        s_ij = q_i·(k_j + r_{i-j}) / √D        for j ≤ i

    The last of the ``max_length`` rows of r is that of distance 0.
    """

    def __init__(self, dim: int, num_heads: int, max_length: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.max_length = num_heads, max_length
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.relative = nn.Parameter(torch.randn(max_length, per_head(dim, num_heads)[0]))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        distance = (positions[:, :, None] - positions[:, None]).clamp(min=0)  # what is later is not seen
        by_distance = q @ self.relative.flip(0).T
        bias = by_distance.gather(-1, distance[:, None].expand(-1, self.num_heads, -1, -1)) / math.sqrt(q.shape[-1])
        mask: Mask | None = causal() if valid is None else visible(x.shape[1], True, valid)
        return self.dropout(merge_heads(attention(q, k, v, mask=mask, bias=bias)))


class Block(nn.Module):
    """``x = W x + positions;  a = LN(attention(x) + x);  y = LN(act(MLP(a)) + a)``, the activation after both layers.

    Args:
        in_dim: width of x; None if it has ``dim`` and is not projected.
        dim, num_heads: of attention.
        max_length: most tokens.
        hidden_dim: of the MLP.
        act: activation.
        positions: "absolute" (sines and cosines are added to x) or "relative" (`RelativeAttention`, causal).
        dropout: after positions, of attention weights; after relative attention.
    """

    table: Tensor

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        num_heads: int,
        max_length: int,
        hidden_dim: int,
        act: type[nn.Module] = nn.ReLU,
        positions: Positions = "absolute",
        dropout: float = 0.0,
    ):
        super().__init__()
        if positions not in ("absolute", "relative"):
            raise ArgumentError(f"positions: expected 'absolute' or 'relative', got {positions!r}")
        if dim % 2 and positions == "absolute":
            raise ArgumentError(f"dim: sines and cosines need an even width, got {dim}")
        self.embed = nn.Identity() if in_dim is None else nn.Linear(in_dim, dim)
        self.max_length, self.dropout = max_length, nn.Dropout(dropout)
        self.attn: Attention | RelativeAttention
        if positions == "absolute":
            self.register_buffer("table", sinusoids(max_length, dim), persistent=False)
            self.attn = Attention(dim, dim, num_heads, dropout)
        else:
            self.attn = RelativeAttention(dim, num_heads, max_length, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp, self.act = MLP(dim, hidden_dim, act=act), act()

    def forward(self, tokens: Tokens) -> Tokens:
        """Those of width ``in_dim`` to as many of width ``dim``."""
        x, positions, valid = tokens
        if positions.max() >= self.max_length:
            raise ShapeError(f"tokens: expected at most {self.max_length}, got {int(positions.max()) + 1}")
        x = self.embed(x)
        if isinstance(self.attn, RelativeAttention):
            mixed = self.attn(x, positions, valid)
        else:
            x = self.dropout(x + self.table[positions])
            mixed = self.attn(x, x, valid)
        a = self.norm1(mixed + x)
        return tokens._replace(x=self.norm2(self.act(self.mlp(a)) + a))


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim), sines and cosines by turns of ``position / 10000^(2i / dim)``."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


#: parts of published names, in this order, to ours
_NAMES = {
    "selfattention.out_proj": "attn.o_proj",
    "selfattention.Er": "attn.relative",
    "selfattention.key": "attn.k_proj",
    "selfattention.query": "attn.q_proj",
    "selfattention.value": "attn.v_proj",
    "selfattention": "attn",
    "out_proj": "o_proj",
    "rule_transformer": "rule_block",
    "stim_transformer": "stim_block",
    "w_embed": "embed",
    "w_out.0": "head",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "layernorm0": "norm1",
    "layernorm1": "norm2",
    "rule_fnn.0": "rule_proj",
    "stim_fnn.0": "stim_proj",
    "fnn_layernorm": "norm",
    "fnnout_layernorm": "out_norm",
    "rule_crossattention": "rule_cross",
    "stim_crossattention": "stim_cross",
    "crossattention": "cross",
    "layernorm_rulecrossattn": "rule_norm",
    "layernorm_stimcrossattn": "stim_norm",
    "layernorm_crossattn": "cross_norm",
    "layernorm_mlp": "mlp_norm",
    "layernorm_latent": "latent_norm",
    "latent_selfattention": "latent_attn",
    "rule_ffn.0": "rule_proj",
    "stim_ffn.0": "stim_proj",
    "latent_ffn.0": "latent_proj",
}


def own_weights(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names; tables of positions and masks are computed, not loaded."""
    weights: dict[str, Tensor] = {}
    for name, tensor in official.items():
        if re.search(r"(^|\.)(pe\.pe|selfattention\.mask)$", name):
            continue
        for old, new in _NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
        weights[name] = tensor
    names = ("q_proj", "k_proj", "v_proj")
    for layer in {name.rpartition(".")[0] for name in weights if name.endswith("in_proj_bias")}:
        renamed = {f"{layer}.in_proj_{kind}": f"{layer}.in_proj.{kind}" for kind in ("weight", "bias")}
        # where context and queries differ in width, the three weights come apart
        renamed |= {f"{layer}.{name}_weight": f"{layer}.{name}.weight" for name in names}
        for old, new in renamed.items():
            if old in weights:
                weights[new] = weights.pop(old)
        split_rows(weights, f"{layer}.in_proj", tuple(f"{layer}.{name}" for name in names))
    return weights
