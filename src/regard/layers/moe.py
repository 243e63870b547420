"""Sparse mixtures of experts: a router chooses for every token, an expert runs on its tokens only."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError


class Routing(NamedTuple):
    """What a router decided for tokens (B, N).

    Attributes:
        indices: (B, N, k) chosen experts, the likeliest first.
        weights: (B, N, k) of their outputs.
        probs: (B, N, E) the distribution the choice was made from.
        logits: (B, N, E) what the router said of each token by itself.
        valid: (B, N) bool, or None if nothing is padding.
    """

    indices: Tensor
    weights: Tensor
    probs: Tensor
    logits: Tensor
    valid: Tensor | None = None

    @classmethod
    def choose(
        cls, probs: Tensor, logits: Tensor, top_k: int, normalise: bool, valid: Tensor | None = None
    ) -> "Routing":
        """The ``top_k`` likeliest experts; their weights are the probabilities, or shares of those that were chosen."""
        weights, indices = probs.topk(top_k, dim=-1)
        if normalise:  # padding may have no probabilities at all
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return cls(indices, weights, probs, logits, valid)


class TopKRouter(nn.Module):
    """``p = softmax(x W)``, of which the k largest are kept (arXiv:1701.06538; k = 1 is Switch, arXiv:2101.03961).

    Args:
        dim: C.
        num_experts: E.
        top_k: experts per token.
        normalise_top_k: weights add up to 1; else they are the probabilities as they are.
        bias: of W.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, normalise_top_k: bool = False, bias: bool = False):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")
        self.top_k, self.normalise_top_k = top_k, normalise_top_k
        self.gate = nn.Linear(dim, num_experts, bias=bias)

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Routing:
        logits = self.gate(x)
        return Routing.choose(logits.softmax(-1), logits, self.top_k, self.normalise_top_k, valid)


class SparseMoE(nn.Module):
    """``y = Σ_{e in top-k} w_e expert_e(x)``; (B, N, C) to the same. No token is dropped.

    Tokens are sorted by expert, so each expert is called once, on its tokens only; an expert without any is called on
    none, so that all parameters have gradients.

    Args:
        router: gives a `Routing`.
        experts: modules (T, C) to (T, C).

    Attributes:
        last_routing: of the last call, for `router_losses` and probes.
    """

    def __init__(self, router: nn.Module, experts: Iterable[nn.Module]):
        super().__init__()
        self.router, self.experts = router, nn.ModuleList(experts)
        self.last_routing: Routing | None = None

    def forward(self, x: Tensor, **route: Any) -> Tensor:
        """``route`` goes to the router, such as ``valid`` (B, N)."""
        return self.mix(x, self.router(x, **route))

    def mix(self, x: Tensor, routing: Routing) -> Tensor:
        """The experts' outputs under a given routing."""
        self.last_routing = routing
        chosen = routing.indices.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        parts = x.flatten(0, -2)[order // routing.indices.shape[-1]].split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y[order.argsort()].view(*routing.indices.shape, -1)
        return (y * routing.weights.unsqueeze(-1).to(y.dtype)).sum(-2)

    def __getstate__(self) -> dict[str, Any]:  # a routing may hold a graph, which cannot be copied
        return self.__dict__ | {"last_routing": None}


def load_balancing_loss(routing: Routing) -> Tensor:
    """``E Σ_e f_e P_e`` (arXiv:2101.03961): f the share of the choices, P the mean probability; 1 when balanced."""
    probs, indices = _tokens(routing.probs, routing.valid), _tokens(routing.indices, routing.valid)
    experts = probs.shape[-1]
    share = indices.flatten().bincount(minlength=experts) / max(1, indices.numel())
    return experts * (share.to(probs.dtype) * probs.mean(0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """The mean over tokens of ``logsumexp(logits)²`` (arXiv:2202.08906), which keeps logits small."""
    return _tokens(routing.logits, routing.valid).logsumexp(-1).square().mean()


def router_losses(model: nn.Module, balance: float = 0.01, z: float = 0.001) -> Tensor:
    """What to add to the loss after a forward: ``Σ_layers (balance · L_LB + z · L_z)``.

    Raises:
        ArgumentError: the model has no `SparseMoE`, or none has run.
    """
    routings = [m.last_routing for m in model.modules() if isinstance(m, SparseMoE) and m.last_routing is not None]
    if not routings:
        raise ArgumentError("model: expected mixtures of experts that have run, found none")
    return torch.stack([balance * load_balancing_loss(r) + z * router_z_loss(r) for r in routings]).sum()


def active_parameters(model: nn.Module) -> int:
    """Parameters that act on one token: all, without those of experts that were not chosen."""
    count = sum(p.numel() for p in model.parameters())
    for layer in (m for m in model.modules() if isinstance(m, SparseMoE)):
        one = sum(p.numel() for p in layer.experts[0].parameters())
        count -= (len(layer.experts) - int(layer.router.top_k)) * one  # type: ignore[arg-type]
    return count


def _tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    return x.flatten(0, -2) if valid is None else x[valid]
