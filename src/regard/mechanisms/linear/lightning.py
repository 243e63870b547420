"""Lightning attention: causal linear attention in which each head forgets at its own rate."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.linear import linear_attention
from regard.mechanisms.base import Mechanism, Pattern
from regard.positions import alibi_slopes

SLOPES = ("alibi", "minimax")
GATES = ("low-rank", "full", "linear")
NORMS = ("layer", "rms", "simple")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
}


class LightningState(NamedTuple):
    """The sums (B, H, D, E) and how many tokens they hold."""

    sums: Tensor
    length: int


class LightningAttention(Mechanism):
    """Linear attention with exponential decay per head (arXiv:2405.17381, TransNormerLLM arXiv:2307.14995).

        o_i = Σ_{j≤i} λ_h^(i-j) (q_i·k_j) v_j            λ_h = exp(-s_h), q, k, v = SiLU(x W)
        y = Wo (norm(o) ∘ gate(x))

    x (B, N, C) to (B, N, C), causal, exact; no softmax, scale or denominator. Slopes s_h fall from head to head and
    from layer to layer: the last one hardly forgets. Computed in chunks; the state is D² numbers per head.

    Args:
        dim, num_heads, head_dim: C, H and D, C / H by default.
        layer_idx, num_layers: which layer this is, from 0.
        slopes: "alibi", or "minimax", which differs where H is no power of two and by 1e-5 in the layers' rule.
        gate: sigmoid of a "low-rank" or a "full" linear map of x, or a "linear" map itself.
        norm: of the joined heads: "layer", "rms" or "simple" (rms without weights).
        activation: of q and k: silu, relu, gelu, sigmoid or elu.
        activate_values: apply it to v too.
        relative: learned rotary angles on q and k that double D (LRPE, arXiv:2307.09270).
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N C D)"
    state: ClassVar = "constant"
    slopes: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        layer_idx: int = 0,
        num_layers: int = 1,
        slopes: str = "alibi",
        gate: str = "low-rank",
        norm: str = "layer",
        activation: str = "silu",
        activate_values: bool = True,
        relative: bool = False,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads, head_dim)
        for name, value, known in (
            ("slopes", slopes, SLOPES),
            ("gate", gate, GATES),
            ("norm", norm, NORMS),
            ("activation", activation, ACTIVATIONS),
        ):
            if value not in known:
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.activation, self.activate_values, self.gate = activation, activate_values, gate
        inner = num_heads * self.head_dim
        self.register_buffer("slopes", lightning_slopes(num_heads, layer_idx, num_layers, slopes), persistent=False)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.gate_proj: nn.Module = nn.Linear(dim, inner, bias=False)
        if gate == "low-rank":
            narrow = nn.Linear(dim, self.head_dim, bias=False)
            self.gate_proj = nn.Sequential(narrow, nn.Linear(self.head_dim, inner, bias=False))
        self.norm: nn.Module = nn.LayerNorm(inner)
        if norm != "layer":
            self.norm = nn.RMSNorm(inner, eps=1e-6, elementwise_affine=norm == "rms")
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.theta: nn.Parameter | None = None
        if relative:
            steps = torch.arange(inner) / inner
            self.theta = nn.Parameter((10_000.0 ** (-2 * steps)).view(num_heads, 1, self.head_dim))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._attend(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: LightningState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, LightningState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._attend(x, state, valid)

    def _attend(self, x: Tensor, state: LightningState | None, valid: Tensor | None) -> tuple[Tensor, LightningState]:
        past = 0 if state is None else state.length
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        act = ACTIVATIONS[self.activation]
        q, k, v = act(q), act(k), act(v) if self.activate_values else v
        if self.theta is not None:
            positions = torch.arange(past, past + x.shape[1], device=x.device, dtype=torch.float32)
            angles = self.theta * positions[:, None]  # (H, N, D)
            q, k = (torch.cat([t * angles.cos(), t * angles.sin()], dim=-1).to(x.dtype) for t in (q, k))
        out, sums = linear_attention(
            q, k, v, decay=-self.slopes, state=None if state is None else state.sums, valid=valid
        )
        gate = self.gate_proj(x)
        gate = gate if self.gate == "linear" else gate.sigmoid()
        return self.o_proj(self.norm(merge_heads(out)) * gate), LightningState(sums, past + x.shape[1])

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, variant: str = "tnl", **official_kwargs: Any
    ) -> "LightningAttention":
        """``variant`` "tnl" (``TnlAttention``), "minimax" (transformers' ``MiniMaxLightningAttention``).

        `regard.models.language.transnormer.TransNormerLLM` loads the whole model.
        """
        state = dict(state_dict)
        if variant == "tnl":
            layers = {"layer_idx": official_kwargs["layer_idx"], "num_layers": official_kwargs["num_layers"]}
            module = cls(official_kwargs["embed_dim"], official_kwargs["num_heads"], **layers)
            load_strictly(module, state, {"output_gate": "gate_proj"})
        elif variant == "minimax":
            heads = official_kwargs["num_attention_heads"]
            module = cls(
                official_kwargs["hidden_size"],
                heads,
                official_kwargs.get("head_dim"),
                layer_idx=official_kwargs["layer_idx"],
                num_layers=official_kwargs["num_hidden_layers"],
                slopes="minimax",
                gate="full",
                norm="rms",
                activation=official_kwargs.get("hidden_act", "silu"),
            )
            if (slopes := state.pop("slope_rate", None)) is not None:
                module.slopes = slopes.flatten().float()
            fused = state.pop("qkv_proj.weight").unflatten(0, (heads, 3, -1))  # each head holds [q | k | v]
            state |= {f"{name}_proj.weight": fused[:, i].flatten(0, 1) for i, name in enumerate("qkv")}
            load_strictly(module, state, {"output_gate": "gate_proj", "out_proj": "o_proj"})
        else:
            raise ArgumentError(f"variant: expected tnl or minimax, got {variant!r}")
        return module


def lightning_slopes(num_heads: int, layer_idx: int = 0, num_layers: int = 1, rule: str = "alibi") -> Tensor:
    """(H,) decay rates: ALiBi's (arXiv:2108.12409), times ``1 - layer / (layers - 1) + 1e-5``."""
    if not 0 <= layer_idx < num_layers:
        raise ArgumentError(f"layer_idx: expected 0 to {num_layers - 1}, got {layer_idx}")

    slopes = alibi_slopes(num_heads)
    if rule == "minimax":
        slopes = 2.0 ** (-8 * torch.arange(1, num_heads + 1) / num_heads)
    depth = num_layers - 1 + (1e-5 if rule == "minimax" else 0.0)
    factor = 1 - layer_idx / depth + 1e-5 if num_layers > 1 else 1.0
    return slopes * factor
