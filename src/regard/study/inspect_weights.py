"""Every weight of one forward, a few heads at a time, reduced at once to what a page can show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.statistics import statistics
from regard.errors import Unsupported
from regard.sites import Call, Method, Site
from regard.sites.site import Kind

_CHUNK_BYTES = 2**28  # of weights held at once


@dataclass(frozen=True, eq=False)
class Plan:
    """What to make of the weights (N, N) of a head.

    Attributes:
        groups, parts: (N,) the group and the part that each token is in.
        factors: by name of a figure, what the weights are multiplied with (N, N) before they are summed.
        kept: keys to keep of each query and layer.
    """

    groups: Tensor
    parts: Tensor
    factors: Mapping[str, Tensor]
    kept: int = 0


@dataclass(frozen=True, eq=False)
class Reduced:
    """What was made of U units: the heads of every layer, and after those their mean.

    Attributes:
        plan: what was asked for.
        causal: no query looked at a later key.
        units: layer and head of each; the head of a mean is None.
        entropy: (U,) mean over queries, in nats.
        received: (U, N), what each key got from all queries.
        patterns: (U, G, G), mean attention of the queries of a group to all keys of a group.
        flow: (U, P, P), the same between parts.
        figures: by name, (U,).
        top, shares: (layers, N, K), the keys each query attends to most, mean over heads, and how much.
    """

    plan: Plan
    causal: bool
    units: list[tuple[int, int | None]]
    entropy: Tensor
    received: Tensor
    patterns: Tensor
    flow: Tensor
    figures: dict[str, Tensor]
    top: Tensor
    shares: Tensor


@dataclass(kw_only=True, eq=False)
class Reducer(Method):
    """Watches one forward of one sequence whose tokens attend to each other.

    Args:
        planned: from the numbers of tokens, layers and units (see `Reduced`) to the plan.
        on_progress: called with layers done and their number.
    """

    name: ClassVar[str] = "inspect"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"decoder", "encoder"})
    planned: Callable[[int, int, int], Plan]
    on_progress: Callable[[int, int], None] | None = None

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        self._found: dict[int, tuple[Tensor, ...]] = {}
        self._causal, self._sites = True, len(sites)

    def after(self, call: Call) -> None:
        heads, n, m = call.query.shape[1], call.query.shape[2], call.key.shape[2]
        if not self._found:
            self._plan = self.planned(n, self._sites, self._sites * (heads + 1))
            self._factors = torch.stack(list(self._plan.factors.values())).flatten(1)
        plan, tokens, batch = self._plan, len(self._plan.groups), call.query.shape[0]
        if (batch, n, m) != (1, tokens, tokens) or call.site.index in self._found:
            raise Unsupported(
                f"inspecting {call.site.name}: expected one attention a layer of {tokens} tokens to each other, "
                f"got {n} queries and {m} keys in a batch of {batch}"
            )
        mean, parts = torch.zeros(n, n), []
        step = max(1, _CHUNK_BYTES // (4 * n * n))
        for start in range(0, heads, step):
            found = statistics(
                call.query, call.key, mask=call.mask, bias=call.bias, scale=call.scale,
                rows=range(n), heads=range(start, min(start + step, heads)),
            )  # fmt: skip
            weights = found.rows[0].cpu()
            mean += weights.sum(0) / heads
            entropy, received = found.entropy[0].mean(-1).cpu(), found.mass[0].cpu()
            figures = weights.flatten(1) @ self._factors.T
            parts.append((entropy, received, _pooled(weights, plan.groups), _pooled(weights, plan.parts), figures))
        self._causal = self._causal and not mean.triu(1).any()
        of_heads = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        with_mean = (torch.cat([tensor, tensor.mean(0, keepdim=True)]) for tensor in of_heads)
        shares, top = mean.topk(min(n, plan.kept))
        self._found[call.site.index] = (*with_mean, top, shares)
        if self.on_progress is not None:
            self.on_progress(len(self._found), self._sites)

    @property
    def reduced(self) -> Reduced:
        """What the forward gave.

        Raises:
            Unsupported: it computed no attention that could be seen.
        """
        if not self._found:
            raise Unsupported("inspecting the model: it computed no attention that could be seen")
        layers = sorted(self._found)
        columns = list(zip(*(self._found[layer] for layer in layers), strict=True))
        entropy, received, patterns, flow, figures = (torch.cat(column) for column in columns[:5])
        top, shares = (torch.stack(column) for column in columns[5:])
        units = [
            (layer, head if head < last else None)
            for layer in layers
            for last in [len(self._found[layer][0]) - 1]
            for head in range(last + 1)
        ]
        by_name = dict(zip(self._plan.factors, figures.T, strict=True))
        return Reduced(
            self._plan, self._causal, units, entropy, received, patterns, flow, by_name, top, shares
        )  # fmt: skip


def _pooled(weights: Tensor, groups: Tensor) -> Tensor:
    """(H, N, N) -> (H, G, G): mean over the queries of a group of the sum over the keys of a group."""
    inside = F.one_hot(groups).float()
    return (inside / inside.sum(0)).T @ (weights @ inside)
