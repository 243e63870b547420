"""One attention computation on its way through the stages."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.masks import Mask
from regard.sites.site import Site


@dataclass(eq=False)
class Step:
    """What is known at a site before its attention module runs: handed to cache layers and kept on the `Call`.

    Attributes:
        positions: (B or 1, N) positions of the new tokens, as the model counts them.
        cos, sin: (B or 1, 1, N, rotary_dim) angles the model rotates the new queries and keys with, or None.
        valid: (B, N) which new tokens are real (not padding), or None when all are.
        past: number of tokens that were read before these; 0 at a new beginning.
        memo: lives for one forward and is shared by its sites: what a method computes once for all of them.
    """

    positions: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    valid: Tensor | None = None
    past: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """The arguments of one attention computation; stages change it in place.

    Attributes:
        site: where it happens.
        query: (B, H, N, D). key: (B, Hk, M, D). value: (B, Hk, M, Dv). In self-attention the last N keys belong to the
            N queries.
        mask: the keys each query may see, in key slots 0..M-1 and query rows 0..N-1, or None for all.
        bias: additive bias broadcastable to (B, H, N, M), or None.
        scale: factor on query·key.
        step: positions and rotary state of the new tokens.
        layer: the cache layer the keys came from, or None without a cache.
        key_positions: (B or 1, Hk or 1, M) position of each key slot, None where slot and position coincide.
        probe: (B or 1, Hk or 1, M, P) extra value columns mixed with the same weights as `value`, or None; a method
            that replaces `attend` mixes `payload` so that probes (where does it look?) see what it really does.
        out, lse: the result, for `after`; `lse` only where a method needs it.
        weights: (B, H, N, M), where some method made them exist, else None.
    """

    site: Site
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    scale: float
    step: Step
    bias: Tensor | None = None
    layer: Any = None
    key_positions: Tensor | None = None
    probe: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    weights: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        """Query heads per key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def past(self) -> int:
        """Number of key slots that were there before this call's own tokens."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def is_prefill(self) -> bool:
        """Whether several tokens enter at once, as a prompt does."""
        return self.query.shape[2] > 1

    @property
    def payload(self) -> Tensor:
        """What the attention weights mix: the values, with the probe's columns appended when there are some."""
        if self.probe is None:
            return self.value
        probe = self.probe.to(self.value.dtype).expand(*self.value.shape[:3], -1)
        return torch.cat((self.value, probe), dim=-1)
