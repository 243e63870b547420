"""A way to watch or replace the attention that a module computes: used by `regard.sites`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from regard.masks import Mask

#: query, key, value, mask, bias, scale -> output
Attend = Callable[[Tensor, Tensor, Tensor, Mask | Tensor | None, Tensor | None, float], Tensor]

#: the innermost block comes last; empty almost always
STACK: list[Attend | None] = []


@contextmanager
def intercepted(attend: Attend | None) -> Iterator[None]:
    """Within the block `regard.attention` calls ``attend``; with None it computes by itself again."""
    STACK.append(attend)
    try:
        yield
    finally:
        STACK.pop()
