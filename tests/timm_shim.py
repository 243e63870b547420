"""timm, which needs torchvision, without torchvision's operators: ``from tests.timm_shim import timm``.

The torchvision wheel of the package index has no operators for a CPU build of torch, so it fails on import when it
registers their shapes. timm needs only the part of it that is Python: with that step left out it works. transformers
would trip over such a torchvision too, so both lie in a folder of their own (`make install`), on the path only here.
"""

import sys
from pathlib import Path
from types import ModuleType

sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
sys.path.insert(0, str(Path(sys.prefix) / "timm"))
try:
    import timm
    import timm.models
finally:
    del sys.path[0]

__all__ = ["timm"]
