"""PowerAttention (arXiv:2503.03588): keys at power-of-two block distances, a local window, and sink blocks."""

from dataclasses import dataclass
from typing import ClassVar

from regard import masks
from regard.errors import ArgumentError
from regard.masks import Mask
from regard.sites import Call, Method


@dataclass(kw_only=True)
class PowerAttention(Method):
    """Restrict attention to `masks.power`: O(log N) key blocks per query, full reach after log2 N layers.

    Static, the same for all heads, and exact softmax attention inside the pattern. Everything stays in the cache,
    because a token far back comes into view again when its distance is a power of two. The paper continues training
    with the pattern; on an untrained model it is an approximation.

    Args:
        block_size: tokens per block (the paper's runs use 256 at 32k tokens).
        window_blocks: nearest blocks that are always seen, the query's own included.
        sink_blocks: first blocks that are always seen.
    """

    name: ClassVar[str] = "power-attention"
    block_size: int = 32
    window_blocks: int = 5
    sink_blocks: int = 1

    def __post_init__(self) -> None:
        for argument, least in (("block_size", 1), ("window_blocks", 0), ("sink_blocks", 0)):
            if getattr(self, argument) < least:
                raise ArgumentError(f"{argument} must be at least {least}, got {getattr(self, argument)}")

    def mask(self, call: Call) -> Mask:
        return masks.power(self.block_size, self.window_blocks, self.sink_blocks).shift(call.past)
