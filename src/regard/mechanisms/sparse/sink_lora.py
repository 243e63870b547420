"""SinkLoRA: attention in groups, some heads with shifted groups, for cheap long-context fine-tuning."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.layers.lora import inject_lora
from regard.masks import Mask
from regard.masks.grid import Segments
from regard.mechanisms.base import KV, Mechanism, Pattern, check_rate, seen, visible
from regard.mechanisms.softmax import SoftmaxAttention
from regard.positions import rotate_tokens


class ShiftedGroupAttention(Mechanism):
    """Sink fixed attention of SinkLoRA (arXiv:2406.05678), of which LongLoRA's S²-Attn (arXiv:2309.12307) is a case.

        query i of head h sees key j  ⇔  j ≤ i and (group_h(i) = group_h(j) or j < num_sinks)
        group_h(i) = ⌊i / G⌋ for aligned heads, ⌊(i + G/2) / G⌋ for shifted ones

    x (B, N, C) to (B, N, C). Half of the heads are aligned; of the other half, ``return_ratio`` is put back to aligned
    groups too and the rest is shifted, so information passes between groups from layer to layer. The sparse pattern is
    for training: in eval mode attention is full and causal, with the same weights, unless ``always`` is set.

    As released, shifting rolls the sequence, so the first G/2 tokens share a group with the last G/2 and see the
    future. ``leaky=True`` reproduces that, for parity only; it needs G to divide N and has no sinks.

    `sinklora_finetune` prepares a trained model for the paper's recipe.

    Args:
        dim, num_heads, num_kv_heads, head_dim: C, H and the key heads, dividing H.
        group_size: G, even; None takes a quarter of the sequence, as published.
        group_ratio: the share of the sequence that is a group where ``group_size`` is None.
        return_ratio: share of the shifted half of the heads that is put back; 0 is S²-Attn.
        num_sinks: first tokens that all see.
        leaky: roll as the released code does.
        always: use groups in eval mode too.
        rope_theta: base of the rotary angles; None leaves positions out.
        rope_factor: positions are divided by it.
        bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N G C) in training, O(N² C) in eval mode"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        group_size: int | None = None,
        group_ratio: float = 0.25,
        return_ratio: float = 0.5,
        num_sinks: int = 4,
        leaky: bool = False,
        always: bool = False,
        rope_theta: float | None = None,
        rope_factor: float = 1.0,
        bias: bool = False,
    ):
        super().__init__()
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        if group_size is not None and (group_size < 2 or group_size % 2):
            raise ArgumentError(f"group_size: expected an even number, got {group_size}")
        if num_sinks < 0 or (leaky and num_sinks):
            raise ArgumentError(f"num_sinks: expected 0 or more, and 0 with leaky=True, got {num_sinks}")
        if rope_factor <= 0:
            raise ArgumentError(f"rope_factor: expected a number above 0, got {rope_factor}")
        self.group_ratio = check_rate("group_ratio", group_ratio)
        self.shifted_heads = num_heads // 2 - round(check_rate("return_ratio", return_ratio) * (num_heads // 2))
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.group_size, self.num_sinks, self.leaky, self.always = group_size, num_sinks, leaky, always
        self.rope_theta, self.rope_factor = rope_theta, rope_factor
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.qkv(x)
        mask = visible(x.shape[1], True, valid)
        if not (self.training or self.always):
            out = attention(q, k, v, mask=mask)
        elif self.leaky:
            out = rolled_group_attention(q, k, v, self.groups_of(x.shape[1]), self.shifted_heads)
        else:
            out = attention(q, k, v, mask=self._grouped(mask, self.groups_of(x.shape[1])))
        return self.o_proj(merge_heads(out))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        if self.always and (self.leaky or self.group_size is None):
            raise ArgumentError("group_size: streaming in groups needs a fixed one, without leaky")
        past = seen(state)
        q, k, v = self.qkv(x, past)
        state = KV.append(state, k, v, valid)
        mask = visible(x.shape[1], True, state.valid, past)
        if self.always:
            mask = self._grouped(mask, self.groups_of(x.shape[1]), past)
        return self.o_proj(merge_heads(attention(q, state.key, state.value, mask=mask))), state

    def qkv(self, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The rotated queries (B, H, N, D) and keys, and the values (B, Hk, N, D)."""
        q = split_heads(self.q_proj(x), self.num_heads)
        k, v = (split_heads(proj(x), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        q, k = (rotate_tokens(t, self.rope_theta, past, factor=self.rope_factor) for t in (q, k))
        return q, k, v

    def groups_of(self, length: int) -> int:
        """Tokens per group in a sequence of this length."""
        return self.group_size or max(2, int(length * self.group_ratio))

    def _grouped(self, mask: Mask | None, group_size: int, past: int = 0) -> Mask:
        grouped = group_mask(self.num_heads, group_size, self.shifted_heads, self.num_sinks).shift(past)
        return grouped if mask is None else mask & grouped

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "ShiftedGroupAttention":
        """The Llama attention with ``forward_noflashattn`` of the released code, in training: S²-Attn as rolled."""
        module = cls(
            dim=official_kwargs["hidden_size"],
            num_heads=official_kwargs["num_heads"],
            num_kv_heads=official_kwargs.get("num_key_value_heads"),
            head_dim=official_kwargs.get("head_dim"),
            group_ratio=official_kwargs.get("group_size_ratio", 0.25),
            rope_theta=official_kwargs.get("rope_theta", 10_000.0),
            bias=any(name.endswith(".bias") for name in state_dict),
            return_ratio=0.0,
            num_sinks=0,
            leaky=True,
        )
        load_strictly(module, state_dict)
        return module.train()


def sinklora_finetune(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    group_size: int | None = None,
    return_ratio: float = 0.5,
    num_sinks: int = 4,
    rope_factor: float = 1.0,
    train_norms: bool = True,
) -> nn.Module:
    """Prepare a trained model for SinkLoRA's fine-tuning on longer sequences, in place.

    Softmax attention becomes `ShiftedGroupAttention` with the same weights: in groups while training, full otherwise.
    Everything is frozen except low-rank changes of the query, key, value and output projections (arXiv:2106.09685),
    the norms and the embeddings. Train it as usual (published: learning rate 2e-5, 20 steps of warm-up). Afterwards
    `regard.layers.lora.merge_lora` leaves weights that also fit the model as it was.

    Args:
        model: a `LanguageModel`, or any module with `SoftmaxAttention` inside.
        rank, alpha: of the changes, which are scaled by alpha / rank.
        group_size, return_ratio, num_sinks: of the attention.
        rope_factor: positions are divided by it; published is ⌈new length / old length⌉.
        train_norms: train norms and embeddings too, which the paper needs for long contexts.

    Returns:
        The model.

    Raises:
        ArgumentError: no such attention is inside, or an argument does not fit.
        Unsupported: attention with a window or with norms of queries and keys.
    """
    config = {
        "group_size": group_size,
        "return_ratio": return_ratio,
        "num_sinks": num_sinks,
        "rope_factor": rope_factor,
    }
    grouped = {
        (parent, name): _grouped_like(child, rank, alpha, **config)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is SoftmaxAttention
    }
    if not grouped:
        raise ArgumentError(f"model: expected a module with SoftmaxAttention inside, got {type(model).__name__}")
    model.requires_grad_(False)
    for (parent, name), attn in grouped.items():
        setattr(parent, name, attn)
    for module in model.modules():
        if train_norms and isinstance(module, nn.RMSNorm | nn.LayerNorm | nn.Embedding):
            module.requires_grad_()
    return model


def _grouped_like(attn: SoftmaxAttention, rank: int, alpha: float, **config: Any) -> ShiftedGroupAttention:
    if attn.window_size is not None or not isinstance(attn.q_norm, nn.Identity) or not attn.causal:
        raise Unsupported("model: attention with window_size, qk_norm or causal=False cannot be grouped")
    shape = attn.dim, attn.num_heads, attn.num_kv_heads, attn.head_dim
    bias = attn.q_proj.bias is not None
    grouped = ShiftedGroupAttention(*shape, rope_theta=attn.rope_theta, bias=bias, **config)
    grouped.load_state_dict(attn.state_dict())
    inject_lora(grouped, ("q_proj", "k_proj", "v_proj", "o_proj"), rank, alpha)
    return grouped.to(attn.q_proj.weight).train(attn.training)


def group_mask(num_heads: int, group_size: int, shifted_heads: int, num_sinks: int) -> Mask:
    """Causal attention inside groups for any length; the last ``shifted_heads`` have borders half a group further."""
    borders = [0] * (num_heads - shifted_heads) + [group_size // 2] * shifted_heads
    heads = [Segments(group_size, border) for border in borders]
    near = heads[0] if shifted_heads == 0 else masks.per_head(heads)
    return masks.causal() & (near | masks.sinks(num_sinks)) if num_sinks else masks.causal() & near


def rolled_group_attention(q: Tensor, k: Tensor, v: Tensor, group_size: int, shifted_heads: int) -> Tensor:
    """S²-Attn as released: the last heads are rolled by half a group, cut into groups, and rolled back.

    q (B, H, N, D), k and v (B, Hk, N, D) to (B, H, N, D). Sees the future where the roll wraps around.

    Raises:
        ShapeError: the groups do not divide N.
    """
    batch, num_heads, n, _ = q.shape
    if n % group_size:
        raise ShapeError(f"x: with leaky=True groups of {group_size} must divide the sequence, got {n} tokens")
    k, v = (t.repeat_interleave(num_heads // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (into_groups(t, group_size, shifted_heads) for t in (q, k, v))
    out = attention(q, k, v, mask=masks.causal())
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return _roll(out, shifted_heads, group_size // 2)


def into_groups(x: Tensor, group_size: int, shifted_heads: int) -> Tensor:
    """(B, H, N, D), the last heads rolled by half a group, to (B·groups, H, G, D)."""
    rolled = _roll(x, shifted_heads, -group_size // 2)
    return rolled.unflatten(2, (-1, group_size)).transpose(1, 2).flatten(0, 1)


def _roll(x: Tensor, heads: int, by: int) -> Tensor:
    still, rolled = x.split((x.shape[1] - heads, heads), dim=1)
    return torch.cat([still, rolled.roll(by, dims=2)], dim=1)
