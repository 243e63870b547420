"""A plain sliding window: every query sees the last `window_size` tokens. The baseline StreamingLLM is compared to."""

from dataclasses import dataclass
from typing import ClassVar

from regard import masks
from regard.errors import ArgumentError
from regard.masks import Mask
from regard.sites import Call, Method


@dataclass(kw_only=True)
class SlidingWindow(Method):
    """Attend to the last `window_size` tokens only, prompt and generation alike; nothing is dropped from the cache.

    Args:
        window_size: number of keys each query sees, itself included.
    """

    name: ClassVar[str] = "sliding-window"
    window_size: int = 512

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ArgumentError(f"window_size must be at least 1, got {self.window_size}")

    def mask(self, call: Call) -> Mask:
        return masks.sliding_window(self.window_size).shift(call.past)
