"""Softmax attention with full-width heads, small enough to read off what each of them computes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, split_heads


class Circuits(NamedTuple):
    """What the heads of one layer do, for row vectors: scores are z_q KQ zᵀ / √E, values z OV.

    Attributes:
        KQ: (H, E, E), W_Q W_Kᵀ.
        OV: (H, E, n_out), W_V W_O.
    """

    KQ: Tensor
    OV: Tensor


class HeadsOfFullWidth(nn.Module):
    """One layer: every head has the whole width E, and no projection has a bias.

        y = Σ_h softmax(z_q W_Q^h (z W_K^h)ᵀ / √E) z W_V^h W_O^h

    Args:
        d_model: E.
        num_heads: H.
        n_out: width of y.
    """

    def __init__(self, d_model: int, num_heads: int, n_out: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, num_heads * d_model, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(num_heads * d_model, n_out, bias=False)

    def forward(self, z_q: Tensor, z: Tensor, causal: bool = False, double_softmax: bool = False) -> Tensor:
        projected = (self.q_proj(z_q), self.k_proj(z), self.v_proj(z))
        q, k, v = (split_heads(x, self.num_heads) for x in projected)
        mask = masks.causal() if causal else None
        if double_softmax:  # softmax over all tokens, the past of it, and softmax of that
            every = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            flat = torch.zeros_like(q)
            return self.o_proj(merge_heads(attention(flat, k, v, mask=mask, bias=every)))
        return self.o_proj(merge_heads(attention(q, k, v, mask=mask)))

    def circuits(self) -> Circuits:
        """The products of weights that the outputs depend on."""
        shape = (self.num_heads, -1)
        q, k, v = (p.weight.unflatten(0, shape) for p in (self.q_proj, self.k_proj, self.v_proj))  # (H, D, E)
        o = self.o_proj.weight.unflatten(1, shape).movedim(1, 0)  # (H, n_out, D)
        return Circuits(q.mT @ k, v.mT @ o.mT)


class InContextAttention(nn.Module):
    """Attention that answers a query from examples (arXiv:2503.12734): (B, 1, E), (B, L, E) to (B, 1, n_out).

    One layer is `HeadsOfFullWidth`, in which the query is no key: with tokens [x; y] and a query [x_q; 0] it is as much
    as in-context regression needs. `regard.tasks.in_context` has the task and the predictors of the theory,
    `regard.probes.in_context` reads the heads, and ``regard study in-context`` trains it and puts both side by side.

    More layers are a causal stack over the examples and the query after them, each as wide as E, and a linear layer on
    the query's output.

    Args:
        d_model: E.
        num_heads: H, each of width E.
        n_out: width of the answer.
        num_layers: 1, or more for the causal stack.
        weight_tying: one layer's weights for all.
        double_softmax: the published stack's: softmax over all tokens, then over the past of the result. Tokens see
            the future through the first. For its weights only.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        n_out: int = 1,
        num_layers: int = 1,
        weight_tying: bool = False,
        double_softmax: bool = False,
    ):
        super().__init__()
        sizes = {"d_model": d_model, "num_heads": num_heads, "n_out": n_out, "num_layers": num_layers}
        for name, value in sizes.items():
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if double_softmax and num_layers == 1:
            raise ArgumentError("double_softmax: expected a causal stack of 2 layers or more, got num_layers=1")
        self.d_model, self.double_softmax, self.num_layers = d_model, double_softmax, num_layers
        wide = n_out if num_layers == 1 else d_model
        count = 1 if weight_tying else num_layers
        self.layers = nn.ModuleList(HeadsOfFullWidth(d_model, num_heads, wide) for _ in range(count))
        self.final_linear = nn.Identity() if num_layers == 1 else nn.Linear(d_model, n_out, bias=False)

    def forward(self, z_q: Tensor, z: Tensor) -> Tensor:
        for name, x in (("z_q", z_q), ("z", z)):
            if x.dim() != 3 or x.shape[-1] != self.d_model:
                raise ShapeError(f"{name}: expected (B, N, {self.d_model}), got {tuple(x.shape)}")
        if z_q.shape[0] != z.shape[0]:
            raise ShapeError(f"z: expected a batch of {z_q.shape[0]}, got {z.shape[0]}")
        if self.num_layers == 1:
            return self.layers[0](z_q, z)
        if z_q.shape[1] != 1:
            raise ShapeError(f"z_q: expected one query in a causal stack, got {z_q.shape[1]}")
        x = torch.cat([z, z_q], 1)
        for i in range(self.num_layers):
            x = self.layers[i % len(self.layers)](x, x, True, self.double_softmax)
        return self.final_linear(x[:, -1:])

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        n_layers: int,
        d_model: int,
        num_heads: int,
        n_out: int = 1,
        weight_tying: bool = False,
        **unknown: Any,
    ) -> "InContextAttention":
        """``MultiHeadAttentionStack``; its causal layers keep their double softmax."""
        if unknown:
            raise ArgumentError(f"unknown argument {', '.join(unknown)}")
        module = cls(d_model, num_heads, n_out, n_layers, weight_tying and n_layers > 1, n_layers > 1)
        state = {name: t for name, t in state_dict.items() if not name.endswith(".bias")}  # -1e9 of the mask
        if weight_tying:  # published once per layer
            state = {name: t for name, t in state.items() if name.split(".")[1] == "0" or "layers" not in name}
        load_strictly(module, state, {"attention_layer.": "layers.0.", "attention_layers.": "layers."})
        return module
