"""regard: build attention, put it into pretrained models, see where they look, steer them, measure the cost.

The public verbs are imported on first use, so ``import regard`` costs little more than ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it (a package listed under its own name is itself the public object)
_EXPORTS = {
    "masks": "regard.masks",
    "attention": "regard.attention",
    "merge": "regard.attention",
    "Partial": "regard.attention",
    "select": "regard.select",
    "create": "regard.mechanisms",
    "from_official": "regard.mechanisms",
    "apply": "regard.sites",
    "record": "regard.probes",
    "compare": "regard.study",
    "catalog": "regard.catalog",
}

__all__ = [
    "Partial",
    "__version__",
    "apply",
    "attention",
    "catalog",
    "compare",
    "create",
    "from_official",
    "masks",
    "merge",
    "record",
    "select",
]

if TYPE_CHECKING:
    from regard import attention, catalog, masks, select
    from regard.attention import Partial, merge
    from regard.mechanisms import create, from_official
    from regard.probes import record
    from regard.sites import apply
    from regard.study import compare


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'regard' has no attribute {name!r}; public names: {', '.join(sorted(_EXPORTS))}")
    module = import_module(_EXPORTS[name])
    value = module if _EXPORTS[name] == f"regard.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
