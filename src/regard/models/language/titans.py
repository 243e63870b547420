"""The language model around Titans' neural memory: memory as context."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, split_heads, split_rows
from regard.mechanisms.memory.titans import NeuralMemory, official_config, official_names
from regard.positions import rotate


class MemoryAsContextTransformer(nn.Module):
    """Titans, memory as context (arXiv:2501.00663), in the form of github:lucidrains/titans-pytorch.

    Every segment of ``segment_len`` tokens is followed by ``num_longterm`` learned ones. A layer is

        x += Memory(x);   x += Attention([P; segment]);   x += W2 (SiLU(g) ∘ u),  [u, g] = W1 RMSNorm(x)

    with attention inside the segment, persistent keys and values P, and from the second layer on values mixed with
    those of the first. This is not the paper's MAC: its attention reads the memory from the residual stream.

    Tokens (B, N), integers, to logits (B, N, vocab_size). Linear in N. Causal.

    Args:
        vocab_size, dim, depth, num_heads, head_dim: of the model.
        segment_len, num_longterm, num_persistent: as above.
        memory_layers: which layers have a memory, counted from 1; None for all.
        memory_segment_len: tokens per update of the memory, ``segment_len + num_longterm`` by default.
        gate_attention: multiply attention's output by sigmoid(Memory(x)) instead of adding the memory.
        sliding: attend to the last ``segment_len + num_longterm`` tokens besides oneself, instead of the segment.
        ff_mult: the hidden width is 2/3 of so many times dim.
        memory: arguments of `NeuralMemory`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        segment_len: int,
        num_heads: int = 8,
        head_dim: int = 64,
        num_persistent: int = 0,
        num_longterm: int = 0,
        memory_layers: tuple[int, ...] | None = None,
        memory_segment_len: int | None = None,
        gate_attention: bool = False,
        sliding: bool = False,
        ff_mult: float = 4,
        memory: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if segment_len < 1:
            raise ArgumentError(f"segment_len: expected at least 1, got {segment_len}")
        self.segment_len, self.gate_attention = segment_len, gate_attention
        window = segment_len + num_longterm
        self.memory_segment_len = memory_segment_len or window
        self.token_emb = nn.Embedding(vocab_size, dim)
        self.longterm = nn.Parameter(torch.randn(num_longterm, dim) * 0.02)
        self.position = nn.ModuleList(
            nn.Sequential(
                nn.Linear(1, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)
            )
            for _ in range(2)
        )
        chosen = range(1, depth + 1) if memory_layers is None else memory_layers
        self.memories = nn.ModuleDict(
            {
                str(i): NeuralMemory(dim, chunk_size=self.memory_segment_len, **(memory or {}))
                for i in chosen
                if i <= depth
            }
        )
        self.attentions = nn.ModuleList(
            SegmentAttention(dim, num_heads, head_dim, window, num_persistent, mix_values=i > 0, sliding=sliding)
            for i in range(depth)
        )
        self.mlps = nn.ModuleList(GatedMLP(dim, int(dim * ff_mult * 2 / 3)) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ShapeError(f"tokens: expected (B, N) with N ≥ 1, got {tuple(tokens.shape)}")
        x = self._with_longterm(self.token_emb(tokens))
        x = x + self._positions(x)
        first = None
        for i, (attend, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True), 1):
            gate: Tensor | float = 1.0
            if str(i) in self.memories:
                retrieved = self.memories[str(i)](x)
                if self.gate_attention:
                    gate = retrieved.sigmoid()
                else:
                    x = x + retrieved
            y, values = attend(x, first)
            first = values if first is None else first
            x = x + y * gate
            x = x + mlp(x)
        return self.to_logits(self.norm(self._without_longterm(x, tokens.shape[1])))

    def _with_longterm(self, x: Tensor) -> Tensor:
        batch, n, _ = x.shape
        s, extra = self.segment_len, len(self.longterm)
        x = F.pad(x, (0, 0, 0, -n % s)).unflatten(1, (-1, s))
        x = torch.cat([x, self.longterm.expand(batch, x.shape[1], -1, -1)], 2).flatten(1, 2)
        return x[:, : n + (n - 1) // s * extra]

    def _without_longterm(self, x: Tensor, n: int) -> Tensor:
        window = self.segment_len + len(self.longterm)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % window)).unflatten(1, (-1, window))
        return x[:, :, : self.segment_len].flatten(1, 2)[:, :n]

    def _positions(self, x: Tensor) -> Tensor:
        n, inner = x.shape[1], self.memory_segment_len
        steps = (torch.arange(k, device=x.device, dtype=x.dtype).unsqueeze(-1) for k in (-(-n // inner), inner))
        outer, within = (mlp(step) for mlp, step in zip(self.position, steps, strict=True))
        return (outer.unsqueeze(1) + within).flatten(0, 1)[:n]

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **official_kwargs: Any) -> "MemoryAsContextTransformer":
        """Weights and arguments of lucidrains' ``MemoryAsContextTransformer``, without hyper-connections.

        Raises:
            Unsupported: several residual streams, memories of earlier layers, or other options without a counterpart.
        """
        kwargs = dict(official_kwargs)
        off = {"neural_mem_weight_residual", "neural_memory_qkv_receives_diff_views", "use_flex_attn"}
        if used := [key for key in off if kwargs.pop(key, False) and key != "use_flex_attn"]:
            raise Unsupported(f"MemoryAsContextTransformer: {', '.join(sorted(used))}")
        if (streams := kwargs.pop("num_residual_streams", 4)) != 1:
            raise Unsupported(f"num_residual_streams: only 1 (no hyper-connections) is supported, got {streams}")
        names = {
            "num_tokens": "vocab_size",
            "dim_head": "head_dim",
            "heads": "num_heads",
            "num_persist_mem_tokens": "num_persistent",
            "num_longterm_mem_tokens": "num_longterm",
            "neural_memory_layers": "memory_layers",
            "neural_memory_segment_len": "memory_segment_len",
            "neural_mem_gate_attn_output": "gate_attention",
            "sliding_window_attn": "sliding",
        }
        dim, batch_size = kwargs["dim"], kwargs.pop("neural_memory_batch_size", None)
        memory = {"dim": dim, "batch_size": batch_size} | kwargs.pop("neural_memory_kwargs", {})
        config = official_config(memory)
        config.pop("dim")
        kwargs.pop("neural_memory_add_value_residual", None)  # never read by the published code
        if unknown := kwargs.keys() - names.keys() - {"dim", "depth", "segment_len", "ff_mult"}:
            raise Unsupported(f"MemoryAsContextTransformer: {', '.join(sorted(unknown))}")
        model = cls(**{names.get(key, key): value for key, value in kwargs.items()}, memory=config)
        state = {name: tensor for name, tensor in state_dict.items() if ".4.memory_model." not in name}
        rename = {"axial_pos_emb.mlps": "position", "longterm_mems": "longterm"}
        head_dim = kwargs.get("dim_head", 64)
        for i in range(len(model.attentions)):
            old = f"layers.{i}"
            split_rows(state, f"{old}.5.to_qkv", tuple(f"{old}.5.{part}_proj" for part in "qkv"))
            for part in "qk":  # published pairs are neighbours, ours are halves
                name = f"{old}.5.{part}_proj.weight"
                state[name] = _halves(state[name], head_dim, 0)
            keys, values = state.pop(f"{old}.5.persistent_memory")
            state[f"{old}.5.persistent"] = torch.stack([_halves(keys, head_dim, 2), values])
            rename |= {f"{old}.5": f"attentions.{i}", f"{old}.5.rotary_emb.freqs": f"attentions.{i}.freqs"}
            rename |= {
                f"{old}.5.to_learned_v_mix.0": f"attentions.{i}.mix",
                f"{old}.5.to_out": f"attentions.{i}.o_proj",
            }
            rename |= {f"{old}.6.{a}": f"mlps.{i}.{b}" for a, b in ((0, "norm"), (1, "up"), (3, "down"))}
            memories = {**model.memories}
            if isinstance(found := memories.get(str(i + 1)), NeuralMemory):
                own = f"memories.{i + 1}"
                rename |= {f"{old}.4": own}
                rename |= {f"{old}.4.{a}": f"{own}.{b}" for a, b in official_names(found).items()}
        load_strictly(model, state, rename)
        return model


def _halves(x: Tensor, head_dim: int, axis: int) -> Tensor:
    """Channels (x0 y0 x1 y1 …) of every head along an axis as (x0 x1 … y0 y1 …)."""
    x = x.movedim(axis, -1)
    return rearrange(x, "... (h d two) -> ... (h two d)", two=2, d=head_dim // 2).movedim(-1, axis)


class SegmentAttention(nn.Module):
    """Causal softmax attention to the own segment (or the last ``window`` tokens) and to learned keys and values.

    x (B, N, C) and the first layer's values (B, H, N, D) to the output and this layer's own values.
    """

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, window: int, num_persistent: int, mix_values: bool, sliding: bool
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.window, self.sliding = num_heads, head_dim, window, sliding
        self.norm = nn.RMSNorm(dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, num_heads * head_dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.mix = nn.Linear(dim, num_heads) if mix_values else None
        self.persistent = nn.Parameter(torch.zeros(2, num_heads, num_persistent, head_dim))
        freqs = 10_000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, x: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        own, n = v, x.shape[1]
        if self.mix is not None and first_values is not None:
            v = v.lerp(first_values, self.mix(x).sigmoid().mT.unsqueeze(-1))
        angles = (torch.arange(n, device=x.device).unsqueeze(-1) * self.freqs).repeat(1, 2)
        q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
        size = n if self.sliding else self.window
        q, k, v = (self._fold(t, size) for t in (q, k, v))
        always = self.persistent.shape[2]
        k, v = (torch.cat([p.expand(len(t), -1, -1, -1), t], 2) for p, t in zip(self.persistent, (k, v), strict=True))
        mask = masks.causal()
        if self.sliding:
            mask = mask & masks.sliding_window(self.window + 1)
        mask = mask.shift(always)
        if self.sliding and always:
            mask = mask | masks.sinks(always)
        y = attention(q, k, v, mask=mask)
        y = rearrange(y, "(b w) h n d -> b h (w n) d", b=len(x))[:, :, :n]
        return self.o_proj(merge_heads(y)), own

    @staticmethod
    def _fold(x: Tensor, size: int) -> Tensor:
        return rearrange(F.pad(x, (0, 0, 0, -x.shape[2] % size)), "b h (w n) d -> (b w) h n d", n=size)


class GatedMLP(nn.Module):
    """``W2 (u ∘ SiLU(g)) + b2`` with ``[u, g] = W1 RMSNorm(x) + b1``."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 2 * hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, -1)
        return self.down(F.silu(gate) * value)
