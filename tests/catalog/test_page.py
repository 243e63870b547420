"""The documentation pages: they are up to date, say what they should, and their examples run."""

import re
from pathlib import Path

import pytest
import torch

from regard import catalog
from regard.catalog.page import argument_help, example, page
from regard.catalog.write_pages import findings_index, pages
from regard.errors import Unsupported

FOLDER = Path(__file__).parents[2] / "docs" / "systems"
WORKING = catalog.systems(status="works")
BACKBONES = [s for s in WORKING if s.models and hasattr(s.load(), "forward_features")]


def test_the_committed_pages_are_what_the_code_says() -> None:
    """`make docs` writes them."""
    assert {path.name: path.read_text() for path in FOLDER.glob("*.md")} == pages()
    assert (FOLDER.parent / "studies" / "findings" / "README.md").read_text() == findings_index()


@pytest.mark.parametrize("system", WORKING, ids=[system.slug for system in WORKING])
def test_a_page_says_what_it_is_and_explains_its_arguments(system) -> None:
    text = page(system)
    for heading in ("## Example", "## What it computes"):
        assert heading in text
    assert system.paper in text
    assert text.count("```") % 2 == 0


@pytest.mark.parametrize("system", WORKING, ids=[system.slug for system in WORKING])
def test_examples_are_python_and_those_of_mechanisms_run(system) -> None:
    code, found = compile(example(system), system.slug, "exec"), system.load()
    if getattr(found, "patterns", None) or hasattr(found, "example_grid"):
        torch.manual_seed(0)
        names: dict[str, object] = {}
        exec(code, names)
        y = names["y"]
        assert isinstance(y, torch.Tensor)
        assert y.isfinite().all()


@pytest.mark.parametrize("system", BACKBONES, ids=[system.slug for system in BACKBONES])
def test_examples_of_backbones_run_without_storage(system) -> None:
    names: dict[str, object] = {"print": lambda *what: shapes.append(what)}
    shapes: list[object] = []
    with torch.device("meta"):  # published sizes, so shapes are all that there is time for
        exec(example(system), names)
    assert names["y"].shape == (2, 10)  # type: ignore[attr-defined]
    assert len(shapes) == len(system.load().sizes[system.models[0]].get("depths", shapes))


def test_every_picture_on_a_page_is_there_and_no_other() -> None:
    linked = {name for text in pages().values() for name in re.findall(r"pictures/([\w-]+\.svg)", text)}
    assert linked == {path.name for path in (FOLDER / "pictures").iterdir()}


def test_there_is_no_page_for_what_is_planned() -> None:
    planned = catalog.systems(status="planned")[0]
    with pytest.raises(Unsupported, match="planned"):
        page(planned)


def test_argument_help_reads_args_sections() -> None:
    class Base:
        """A base.

        Args:
            layers: which layers.
            size: overridden below.
        """

    class Child(Base):
        """A child.

        Args:
            size (int): how large,
                in tokens: a number.
            rate, decay: how fast.

        Returns:
            other: not an argument.
        """

    assert argument_help(Child) == {
        "layers": "which layers.",
        "size": "how large, in tokens: a number.",
        "rate": "how fast.",
        "decay": "how fast.",
    }
    assert argument_help(len) == {}
