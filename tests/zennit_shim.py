"""zennit, which imports torchvision for a class of its models: ``from tests.zennit_shim import zennit``.

It lies beside timm, for the reason that `tests.timm_shim` gives.
"""

import sys
from pathlib import Path

import tests.timm_shim  # noqa: F401 (torchvision without its operators)

sys.path.insert(0, str(Path(sys.prefix) / "timm"))
try:
    import zennit
    import zennit.composites
    import zennit.rules
finally:
    del sys.path[0]

__all__ = ["zennit"]
