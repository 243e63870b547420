"""The floors of docs/design.md: a folder imports only from those below it, and optional packages only where used."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "regard"
DESIGN = (ROOT / "docs" / "design.md").read_text()
#: from the ground up, as the design document lists them: "errors → masks → … → cli"
FLOORS = re.findall(r"\w+", re.search(r"errors →[\w\s→]*?cli", DESIGN)[0])
#: what `pip install regard` brings; everything else from outside is optional
REQUIRED = {
    re.split(r"[^\w-]", dependency)[0].replace("-", "_")
    for dependency in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module the tree imports anywhere, with its line: statements, and `import_module` of a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            if base == "regard":  # `from regard import masks`
                yield from ((node.lineno, f"regard.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def floor_violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports from a floor above the module's own, or from one that has no place in the list."""
    own = module.split(".")[1]
    found = []
    for line, target in imports(ast.parse(source), module, is_package):
        parts = target.split(".")
        if parts[0] != "regard" or len(parts) == 1 or parts[1] == "__version__":
            continue
        if parts[1] not in FLOORS:
            found.append(f"{module}:{line} imports {target}, which stands on no floor")
        elif FLOORS.index(parts[1]) > FLOORS.index(own):
            found.append(f"{module}:{line} imports {target}, which stands above {own}")
    return found


class _AtImport(ast.NodeTransformer):
    """What runs when a module is imported: functions and `if TYPE_CHECKING` blocks are taken out."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return [self.visit(statement) for statement in node.orelse]
        return self.generic_visit(node)


def optional_imports(source: str, module: str) -> list[str]:
    """Imports of optional packages that run when the module is imported.

    `errors.require` is allowed anywhere: it names the extra that is missing. A class that derives from one of an
    optional package's needs it at module level, and `tests/test_import.py` sees to it that such modules load late.
    """
    tree = _AtImport().visit(ast.parse(source))
    known = REQUIRED | sys.stdlib_module_names | {"regard"}
    found = ((line, target) for line, target in imports(tree, module, False) if target.split(".")[0] not in known)
    return [f"{module}:{line} imports {target} outside a function" for line, target in found]


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_module_keeps_to_its_floor(module: str, path: Path) -> None:
    source = path.read_text()
    assert optional_imports(source, module) == []
    if module != "regard":  # the public verbs come from every floor
        assert floor_violations(source, module, is_package=path.name == "__init__.py") == []


def test_every_folder_stands_on_a_floor() -> None:
    assert FLOORS[0] == "errors"
    assert FLOORS[-1] == "cli"
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize(
    "source",
    [
        "from regard.attention import attention",
        "import regard.attention",
        "from regard import attention",
        "from ..attention import attention",
        "def f():\n    from regard.attention import attention",
        "if TYPE_CHECKING:\n    from regard.attention import Partial",
        "importlib.import_module('regard.attention')",
        "from regard.nowhere import x",
    ],
)
def test_a_look_upwards_is_found(source: str) -> None:
    assert len(floor_violations(source, "regard.masks.leaf")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from regard.errors import ShapeError",
        "from .mask import Mask",
        "from regard import __version__",
        "import torch",
    ],
)
def test_a_look_downwards_is_fine(source: str) -> None:
    assert floor_violations(source, "regard.masks.leaf") == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert floor_violations("from .mask import Mask", "regard.masks", is_package=True) == []
    assert len(floor_violations("from ..study import compare", "regard.masks", is_package=True)) == 1


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import plotly", False),
        ("from transformers.cache_utils import DynamicLayer", False),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", False),
        ("class A:\n    import timm", False),
        ("if TYPE_CHECKING:\n    x = 1\nelse:\n    import plotly", False),
        ("def f():\n    import plotly", True),
        ("if TYPE_CHECKING:\n    from transformers import Cache", True),
        ("layer = require('transformers', 'cache').cache_utils.DynamicLayer", True),
        ("import torch, json\nfrom rich import box", True),
    ],
)
def test_optional_packages_are_imported_where_used(source: str, allowed: bool) -> None:
    assert (optional_imports(source, "regard.cache.layer") == []) is allowed
