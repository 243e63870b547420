"""A Llama forward written out one head and one query at a time, with a cache of Python lists that policies edit.

Shares nothing with regard; an oracle for methods that change what is cached.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Entry:
    """One cached token of one key-value head: its key before rotation, its value, and the attention it received."""

    position: int
    key: Tensor
    value: Tensor
    score: float = 0.0


@dataclass
class NaiveLlama:
    """Runs `model` (a transformers Llama) over one sequence.

    Attributes:
        after: called with (layer index, the heads' entries, number of new tokens) when a layer has attended.
        slots: rotate by place in the cache, not by place in the text.
        cache: layer -> key-value head -> entries.
    """

    model: torch.nn.Module
    after: Callable[[int, list[list[Entry]], int], None]
    slots: Callable[[int], bool] = lambda layer: False
    cache: list[list[list[Entry]]] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self):
        config = self.model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.cache = [[[] for _ in range(self.kv_heads)] for _ in range(config.num_hidden_layers)]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = self.dim // 2
        angle = position * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> Tensor:
        """Logits (T, V) of the next T tokens."""
        body = self.model.model
        x = body.embed_tokens.weight[tokens]
        for index, layer in enumerate(body.layers):
            x = x + self.attend(index, layer.self_attn, norm(layer.input_layernorm, x))
            h = norm(layer.post_attention_layernorm, x)
            gate, up = h @ layer.mlp.gate_proj.weight.T, h @ layer.mlp.up_proj.weight.T
            x = x + (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.T
        self.seen += len(tokens)
        return norm(body.norm, x) @ self.model.lm_head.weight.T

    def attend(self, index: int, attention: torch.nn.Module, h: Tensor) -> Tensor:
        new, cache = len(h), self.cache[index]
        q, k, v = (h @ getattr(attention, f"{name}_proj").weight.T for name in "qkv")
        for g in range(self.kv_heads):
            part = slice(g * self.dim, (g + 1) * self.dim)
            cache[g] += [Entry(self.seen + i, k[i, part], v[i, part]) for i in range(new)]
        out = torch.empty(new, self.heads * self.dim)
        for head in range(self.heads):
            entries = cache[head // (self.heads // self.kv_heads)]
            past = len(entries) - new
            part = slice(head * self.dim, (head + 1) * self.dim)
            places = [j if self.slots(index) else entry.position for j, entry in enumerate(entries)]
            keys = torch.stack([self.rotate(entry.key, place) for entry, place in zip(entries, places, strict=True)])
            for i in range(new):
                visible = entries[: past + i + 1]
                query = self.rotate(q[i, part], places[past + i])
                weights = (keys[: len(visible)] @ query / self.dim**0.5).softmax(0)
                out[i, part] = weights @ torch.stack([entry.value for entry in visible])
                for weight, entry in zip(weights.tolist(), visible, strict=True):
                    entry.score += weight
        self.after(index, cache, new)
        return out @ attention.o_proj.weight.T


def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight
