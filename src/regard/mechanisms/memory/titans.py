"""Titans' neural memory: a small network whose weights are trained by the tokens it reads."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import Mechanism, Pattern, legitimate

Weights = dict[str, Tensor]  #: of one memory network per chunk, each (B, H, ..., *shape)


class MemoryState(NamedTuple):
    """What has been learned so far; its size does not depend on how much that was.

    Attributes:
        weights: W, after the last complete chunk, each (B, H, *shape).
        reference: W_ref, where gradients are taken.
        momentum: S; empty without momentum.
        pending: (B, chunk_size - 1, C), of which the last ``waiting`` tokens wait for their chunk to be complete.
        waiting: see ``pending``.
        written: tokens written since W_ref was taken.
    """

    weights: Weights
    reference: Weights
    momentum: Weights
    pending: Tensor
    waiting: int = 0
    written: int = 0


class NeuralMemory(Mechanism):
    """Neural long-term memory (Titans, arXiv:2501.00663), as github:lucidrains/titans-pytorch computes it.

        S_j = η_j S_{j-1} - ∇_W Σ_{t in chunk j} θ_t mean((M_W(k_t) - v_t)²) at W_ref        (surprise, momentum)
        W_j = (1 - α_j) W_{j-1} + S_j                                                        (forgetting)
        y_t = M_{W_j}(q_t),  j = ⌊(t + 1) / chunk_size⌋

    x (B, N, C) to (B, N, C), causal only. M is an MLP without biases, by default wrapped as ``x + LN(M(x))``; every
    head has its own. θ, η, α are sigmoids of linear maps of the token (θ) or of the chunk's mean (η, α). W_ref is W at
    the last multiple of ``batch_size`` tokens, or the learned W_0 throughout; with W_ref = W_{j-1}
    (``batch_size = chunk_size``) this is the paper's ideal recurrence, otherwise its parallel approximation. An
    incomplete chunk is not written. The weights are computed in float32 at least, and the outer gradient goes through
    the inner one (second order).

    Cost O(N P), P the weights of M; memory O(N / chunk_size · P). The streaming state is 3 P numbers per head at most.
    Padding must be at the end, and a stream takes none, because it would be part of a chunk.

    Args:
        dim: C.
        num_heads: memories side by side; above one their outputs are gated and projected.
        head_dim: D, the width of a memory's keys and values; C / H by default. One head needs D = C.
        depth: matrices of M.
        expansion: hidden width of M over D.
        chunk_size: tokens per update of W.
        batch_size: tokens per update of W_ref, a multiple of chunk_size; None for never.
        momentum, decay: whether S is carried along, and W is forgotten.
        max_lr: θ is between 0 and this.
        pre_norm: RMSNorm of the tokens, one for writing and one for reading.
        residual_norm: whether M is wrapped as ``x + LN(M(x))``.
        qk_norm, post_norm: RMSNorm per head of queries and keys, of what is read.
        lr_modulation: a learned rate per weight tensor and chunk, between 0 and max_modulation.
        max_grad_norm: bound, softly, each weight tensor's gradient.
        causal: True.

    Raises:
        ArgumentError: sizes that do not divide, or are below one.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N C²)"
    state: ClassVar = "constant"

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: float = 2.0,
        chunk_size: int = 1,
        batch_size: int | None = None,
        momentum: bool = True,
        decay: bool = True,
        max_lr: float = 1.0,
        pre_norm: bool = True,
        residual_norm: bool = True,
        qk_norm: bool = False,
        post_norm: bool = False,
        lr_modulation: bool = False,
        max_modulation: float = 1.0,
        max_grad_norm: float | None = None,
        causal: bool = True,
    ):
        super().__init__()
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.head_dim, _ = per_head(dim, num_heads, head_dim)
        if num_heads == 1 and self.head_dim != dim:
            raise ArgumentError(f"head_dim: one head needs head_dim = dim = {dim}, got {head_dim}")
        hidden = int(self.head_dim * expansion)
        for name, value in (
            ("depth", depth),
            ("chunk_size", chunk_size),
            ("expansion * head_dim", hidden),
        ):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if batch_size is not None and (batch_size < 1 or batch_size % chunk_size):
            raise ArgumentError(f"batch_size: expected a multiple of chunk_size {chunk_size}, got {batch_size}")
        self.chunk_size, self.batch_size, self.max_lr = chunk_size, batch_size, max_lr
        self.max_modulation, self.max_grad_norm = max_modulation, max_grad_norm
        inner = num_heads * self.head_dim
        self.store_norm, self.retrieve_norm = (nn.RMSNorm(dim) if pre_norm else nn.Identity() for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (self._head_norm() if qk_norm else nn.Identity() for _ in range(2))
        self.post_norm = self._head_norm() if post_norm else nn.Identity()
        self.theta = nn.Linear(dim, num_heads)
        self.eta = nn.Linear(dim, num_heads) if momentum else None
        self.alpha = nn.Linear(dim, num_heads) if decay else None
        widths = [self.head_dim, *[hidden] * (depth - 1), self.head_dim]
        self.memory = nn.ParameterDict({"norm": torch.zeros(num_heads, self.head_dim)} if residual_norm else {})
        for i, (a, b) in enumerate(pairwise(widths)):
            bound = (6 / (a + b)) ** 0.5
            self.memory[f"w{i}"] = nn.Parameter(torch.empty(a, b).uniform_(-bound, bound).repeat(num_heads, 1, 1))
        self.modulation = nn.Linear(dim, num_heads * len(self.memory)) if lr_modulation else None
        self.gate = nn.Linear(dim, num_heads, bias=False) if num_heads > 1 else None
        self.o_proj = nn.Linear(inner, dim, bias=False) if num_heads > 1 else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        check_padding(valid)
        return self._advance(x, self.initial_state(x))[0]

    def stream(
        self, x: Tensor, state: MemoryState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        check_padding(valid, streaming=True)
        return self._advance(x, self.initial_state(x) if state is None else state)

    def initial_state(self, x: Tensor) -> MemoryState:
        """The memory before the first token of x (B, N, C)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = {name: w.to(dtype).expand(len(x), *w.shape) for name, w in self.memory.items()}
        zeros = {name: torch.zeros_like(w) for name, w in weights.items()} if self.eta is not None else {}
        return MemoryState(weights, weights, zeros, x.new_zeros(len(x), self.chunk_size - 1, self.dim))

    def _advance(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        tokens = torch.cat([state.pending[:, self.chunk_size - 1 - state.waiting :], x], 1)
        complete = tokens.shape[1] // self.chunk_size * self.chunk_size
        history = [{name: w.unsqueeze(2) for name, w in state.weights.items()}]
        weights, reference, momentum, written, start = *state[:3], state.written, 0
        while start < complete:
            n = complete - start if self.batch_size is None else min(self.batch_size - written, complete - start)
            after, momentum = self.write(tokens[:, start : start + n], weights, reference, momentum)
            weights = {name: w[:, :, -1] for name, w in after.items()}
            history.append(after)
            start, written = start + n, 0 if self.batch_size is None else written + n
            if written == self.batch_size:
                reference, written = weights, 0
        stacked = {name: torch.cat([part[name] for part in history], 2) for name in weights}
        y = self.read(x, stacked, skip=state.waiting + 1)
        padded = torch.cat([state.pending, x], 1)
        pending = padded[:, padded.shape[1] - self.chunk_size + 1 :]
        return y, MemoryState(weights, reference, momentum, pending, tokens.shape[1] - complete, written)

    def write(self, x: Tensor, weights: Weights, reference: Weights, momentum: Weights) -> tuple[Weights, Weights]:
        """Learn from complete chunks x (B, n·c, C): the weights after each (B, H, n, *shape), the last momentum."""
        x = self.store_norm(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = x.unflatten(1, (-1, self.chunk_size)).mean(2)

        def rate(linear: nn.Linear, tokens: Tensor) -> Tensor:
            return linear(tokens).to(dtype).sigmoid().mT  # (B, H, n)

        k, v = self.k_norm(split_heads(self.k_proj(x), self.num_heads)), split_heads(self.v_proj(x), self.num_heads)
        k, v = (t.to(dtype).unflatten(2, (-1, self.chunk_size)) for t in (k, v))
        theta = self.max_lr * rate(self.theta, x).unflatten(2, (-1, self.chunk_size))
        at = {name: w.unsqueeze(2).expand(*w.shape[:2], mean.shape[1], *w.shape[2:]) for name, w in reference.items()}

        def loss(w: Weights) -> Tensor:
            return (theta * (apply_memory(w, k) - v).square().mean(-1)).sum()

        surprise = torch.func.grad(loss)(at)  # chunks do not share weights: the sum's gradient is each chunk's own
        if self.max_grad_norm is not None:
            surprise = {name: soft_clamp(g, self.max_grad_norm) for name, g in surprise.items()}
        if self.modulation is not None:
            scales = rate(self.modulation, mean).unflatten(1, (self.num_heads, -1)) * self.max_modulation
            surprise = {name: g * _like(scales[:, :, i], g) for i, (name, g) in enumerate(surprise.items())}
        update = {name: -g for name, g in surprise.items()}
        if self.eta is not None:
            eta = rate(self.eta, mean)
            update = {name: scan(eta, s, momentum[name]) for name, s in update.items()}
            momentum = {name: s[:, :, -1] for name, s in update.items()}
        keep = torch.ones_like(theta[..., 0]) if self.alpha is None else 1 - rate(self.alpha, mean)
        return {name: scan(keep, s, weights[name]) for name, s in update.items()}, momentum

    def read(self, x: Tensor, weights: Weights, skip: int = 1) -> Tensor:
        """What the memories (B, H, m, *shape) say to the tokens (B, n, C): token t asks memory ⌊(t + skip) / c⌋."""
        n, c = x.shape[1], self.chunk_size
        x = self.retrieve_norm(x)
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads)).to(torch.promote_types(x.dtype, torch.float32))
        q = F.pad(q, (0, 0, skip, -(skip + n) % c)).unflatten(2, (-1, c))
        y = apply_memory(weights, q).flatten(2, 3)[:, :, skip : skip + n].to(x.dtype)
        y = self.post_norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid().mT.unsqueeze(-1)
        return self.o_proj(merge_heads(y))

    def _head_norm(self) -> nn.Module:
        return HeadRMSNorm(self.num_heads, self.head_dim)

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, variant: str = "NeuralMemory", **official_kwargs: Any
    ) -> "NeuralMemory":
        """Weights of lucidrains' ``NeuralMemory``; ``model`` holds the arguments of its ``MemoryMLP``.

        ``memory_model.*`` are templates whose values that code never uses; the weights are
        ``memory_model_parameters``. ``dim`` is read from the weights if it is not given.
        """
        if variant != "NeuralMemory":
            raise ArgumentError(f"variant: expected 'NeuralMemory', got {variant!r}")
        dim = state_dict["to_queries.weight"].shape[1]
        module = cls(**official_config({"dim": dim} | official_kwargs))
        state = {name: tensor for name, tensor in state_dict.items() if not name.startswith("memory_model.")}
        load_strictly(module, state, official_names(module))
        return module


def official_config(official_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `NeuralMemory` for those of the published class, ``dim`` among them."""
    names = {
        "heads": "num_heads",
        "dim_head": "head_dim",
        "default_step_transform_max_lr": "max_lr",
        "per_parameter_lr_modulation": "lr_modulation",
        "max_mem_layer_modulation": "max_modulation",
        "pre_rmsnorm": "pre_norm",
        "post_rmsnorm": "post_norm",
        "qk_rmsnorm": "qk_norm",
        "mem_model_norm_add_residual": "residual_norm",
    }
    same = {"dim", "chunk_size", "batch_size", "momentum", "max_grad_norm"}
    initial = {"init_adaptive_step_bias", "init_momentum_bias", "init_decay_bias", "use_accelerated_scan"}
    kwargs = {key: value for key, value in official_kwargs.items() if key not in initial}
    mlp = kwargs.pop("default_model_kwargs", {"depth": 2, "expansion_factor": 4.0})
    mlp = kwargs.pop("model", None) or mlp
    if unknown := kwargs.keys() - names.keys() - same:
        raise Unsupported(f"NeuralMemory: the published options {', '.join(sorted(unknown))} have no counterpart")
    config = {names.get(key, key): value for key, value in kwargs.items()}
    if config.get("head_dim") is None:
        config["head_dim"] = config["dim"]
    return config | {"depth": mlp["depth"], "expansion": mlp.get("expansion_factor", 2.0)}


def official_names(module: NeuralMemory) -> dict[str, str]:
    """Published names of the weights to ours."""
    rename = {f"memory_model_parameters.{i}": f"memory.{name}" for i, name in enumerate(module.memory)}
    rename |= {"to_queries": "q_proj", "to_keys": "k_proj", "to_values": "v_proj", "combine_heads": "o_proj"}
    rename |= {"to_adaptive_step.0": "theta", "to_momentum.0": "eta", "to_decay_factor.0": "alpha"}
    return rename | {
        "to_layer_modulation.0": "modulation",
        "retrieve_gate.0": "gate",
        "multihead_rmsnorm": "post_norm",
    }


class HeadRMSNorm(nn.Module):
    """RMSNorm of every head with its own scale ``1 + gamma``; (B, H, N, D) to the same."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (self.gamma + 1)


def check_padding(valid: Tensor | None, streaming: bool = False) -> None:
    """Refuse padding (B, N) before tokens, and all of it in a stream."""
    if valid is not None and streaming and not bool(valid.all()):
        raise Unsupported("valid: a stream takes no padding, which would become part of a chunk")
    if valid is not None and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise Unsupported("valid: padding must follow the tokens, because chunks are counted from the first one")


def apply_memory(weights: Weights, x: Tensor) -> Tensor:
    """The network M: ``GELU`` between matrices ``w0, w1, …`` (..., a, b); with ``norm`` (..., D), ``x + LN(M(x))``.

    x (..., n, D) to the same.
    """
    y = x
    for i in range(len(weights) - ("norm" in weights)):
        y = (F.gelu(y) if i else y) @ weights[f"w{i}"]
    if "norm" in weights:
        y = x + F.layer_norm(y, y.shape[-1:]) * (weights["norm"].unsqueeze(-2) + 1)
    return y


def scan(decay: Tensor, x: Tensor, initial: Tensor) -> Tensor:
    """``y_j = a_j y_{j-1} + x_j`` with y_{-1} = initial, by pairs: linear work, logarithmic depth.

    decay (B, H, n), x (B, H, n, *shape), initial (B, H, *shape).
    """
    decay = _like(decay, x)
    first = x[:, :, :1] + decay[:, :, :1] * initial.unsqueeze(2)
    return _scan(decay, torch.cat([first, x[:, :, 1:]], 2))


def _scan(a: Tensor, x: Tensor) -> Tensor:
    n = x.shape[2]
    if n == 1:
        return x
    half = n // 2
    even, odd = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    odds = _scan(a[:, :, odd] * a[:, :, even], x[:, :, odd] + a[:, :, odd] * x[:, :, even])
    evens = torch.cat([x[:, :, :1], x[:, :, 2::2] + a[:, :, 2::2] * odds[:, :, : (n - 1) // 2]], 2)
    pairs = torch.stack([evens[:, :, :half], odds], 3).flatten(2, 3)
    return torch.cat([pairs, evens[:, :, half:]], 2)


def soft_clamp(gradient: Tensor, max_norm: float) -> Tensor:
    """Gradients (B, H, n, *shape) with norms r bent to ``(tanh(2 r / max) + 1) max / 2``, as published."""
    norm = gradient.flatten(3).norm(dim=-1)
    bent = (torch.tanh(2 * norm / max_norm) + 1) * max_norm / 2
    return gradient * _like(bent / norm, gradient)


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(*x.shape, *[1] * (other.dim() - x.dim()))
