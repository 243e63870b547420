"""`import regard` is cheap, and its public names are all there."""

import subprocess
import sys

import pytest

import regard

OPTIONAL = ("transformers", "gguf", "diffusers", "timm", "plotly", "jinja2", "psutil")


def loaded_after(statements: str) -> set[str]:
    """The optional packages that are in `sys.modules` after running `statements` in a new interpreter."""
    script = f"import sys\n{statements}\nprint(*(m for m in {OPTIONAL!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statements",
    [
        "import regard",
        "from regard import attention, catalog, masks, merge, select",
        "import regard; regard.masks.causal() & regard.masks.sliding_window(8)",
        "from regard import apply",
    ],
)
def test_importing_needs_no_optional_package(statements: str) -> None:
    assert loaded_after(statements) == set()


def test_the_check_can_fail() -> None:
    assert loaded_after("import psutil") == {"psutil"}


def test_dir_lists_the_public_verbs() -> None:
    verbs = {"Partial", "apply", "attention", "catalog", "compare", "masks", "merge", "select"}
    assert verbs <= set(dir(regard))
    assert set(dir(regard)) == set(regard.__all__)


@pytest.mark.parametrize("name", sorted(regard.__all__))
def test_public_name_resolves(name: str) -> None:
    assert getattr(regard, name) is not None


def test_unknown_name_is_refused_with_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'atention'; public names: Partial, apply, attention"):
        _ = regard.atention


@pytest.mark.parametrize(
    "first",
    [
        "import regard.attention",
        "import regard.attention.operator",
        "from regard.attention import attention",
        "from regard import merge",
        "import regard.sites",
    ],
)
def test_attention_is_the_operator_whatever_was_imported_first(first: str) -> None:
    """Importing a submodule binds its name in the package, past `regard.__getattr__`."""
    script = f"{first}\nimport regard, torch\nx = torch.ones(1, 1, 2, 4)\nprint(regard.attention(x, x, x).shape)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([1, 1, 2, 4])\n"
