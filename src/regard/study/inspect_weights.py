"""Every weight of one forward, a few heads at a time, reduced at once to what a page can show."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.statistics import statistics
from regard.errors import Unsupported
from regard.sites import Call, Method, Site

_CHUNK_BYTES = 2**28  # of weights held at once


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is kept of a layer's weights. The last of H + 1 heads is their mean.

    Attributes:
        entropy: (H + 1,), mean over queries, in nats.
        received: (H + 1, N), what each key got from all queries.
        pattern: (H + 1, G, G), mean attention of the queries of a group to all keys of a group.
        flow: (H + 1, S, S), the same between parts.
        figures: (H + 1, F), the weights summed with each of `Reducer.factors`.
        top, shares: (N, K), the keys each query attends to most, mean over heads, and how much.
    """

    entropy: Tensor
    received: Tensor
    pattern: Tensor
    flow: Tensor
    figures: Tensor
    top: Tensor
    shares: Tensor


@dataclass(kw_only=True, eq=False)
class Reducer(Method):
    """Watches one forward of one sequence whose tokens attend to each other.

    Args:
        grouping: from the number of heads, those of means included, to the group (N,) of each token.
        parts: (N,) the part of each token.
        factors: (F, N, N), what the weights are multiplied with and summed to a figure.
        kept: from the number of layers to that of keys to keep of each query.
        on_progress: called with layers done and their number.
    """

    name: ClassVar[str] = "inspect"
    grouping: Callable[[int], Tensor]
    parts: Tensor
    factors: Tensor
    kept: Callable[[int], int] = lambda layers: 0
    on_progress: Callable[[int, int], None] | None = None

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        self.found: dict[int, Reduced] = {}
        self.causal = True  # until a key after its query is seen
        self._sites = len(sites)

    def after(self, call: Call) -> None:
        heads, n, m, length = call.query.shape[1], call.query.shape[2], call.key.shape[2], len(self.parts)
        if n != m or n != length or call.site.index in self.found:
            raise Unsupported(f"inspecting {call.site.name}: it has {n} queries and {m} keys for {length} tokens")
        if not self.found:
            self.groups = self.grouping(self._sites * (heads + 1))
        mean, parts = torch.zeros(n, n), []
        step = max(1, _CHUNK_BYTES // (4 * n * n))
        for start in range(0, heads, step):
            found = statistics(
                call.query, call.key, mask=call.mask, bias=call.bias, scale=call.scale,
                rows=range(n), heads=range(start, min(start + step, heads)),
            )  # fmt: skip
            weights = found.rows[0].cpu()
            mean += weights.sum(0) / heads
            figures = weights.flatten(1) @ self.factors.flatten(1).T
            entropy, received = found.entropy[0].mean(-1).cpu(), found.mass[0].cpu()
            parts.append((entropy, received, _pooled(weights, self.groups), _pooled(weights, self.parts), figures))
        self.causal = self.causal and not mean.triu(1).any()
        top = mean.topk(min(n, self.kept(self._sites)))
        of_heads = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        with_mean = (torch.cat([tensor, tensor.mean(0, keepdim=True)]) for tensor in of_heads)
        self.found[call.site.index] = Reduced(*with_mean, top.indices, top.values)
        if self.on_progress is not None:
            self.on_progress(len(self.found), self._sites)


def _pooled(weights: Tensor, groups: Tensor) -> Tensor:
    """(H, N, N) -> (H, G, G): mean over the queries of a group of the sum over the keys of a group."""
    inside = F.one_hot(groups).float()
    return (inside / inside.sum(0)).T @ (weights @ inside)
