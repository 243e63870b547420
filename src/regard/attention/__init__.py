"""Exact attention: the operator, its partial results, and how they merge.

The package is itself the operator: ``regard.attention(q, k, v, mask=...)`` calls `attention`.
"""

import sys
from types import ModuleType
from typing import Any

from regard.attention.operator import Explanation, attention, explain
from regard.attention.partial import Partial, merge
from regard.attention.received import received

__all__ = ["Explanation", "Partial", "attention", "explain", "merge", "received"]


class _Operator(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return attention(*args, **kwargs)


sys.modules[__name__].__class__ = _Operator
