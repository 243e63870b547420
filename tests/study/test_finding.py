"""Findings: each runs, and what is committed of it is what its numbers say."""

import json
from pathlib import Path

import pytest

from regard.catalog.findings import FINDINGS
from regard.errors import ArgumentError
from regard.study import finding
from regard.study.finding import Claim, Finding

FOLDER = Path(__file__).parents[2] / "docs" / "studies" / "findings"


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_runs_and_is_drawn(name, tmp_path) -> None:
    seen = []
    found = finding.run(name, quick=True, on_progress=lambda *step: seen.append(step))
    assert (found.name, found.settings["quick"]) == (name, True)
    assert found.claims
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)
    data, page, figure = found.save(tmp_path)
    assert Finding.load(data).markdown() == page.read_text()
    assert figure.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("name", FINDINGS)
def test_the_committed_page_is_made_of_the_numbers(name) -> None:
    """`regard study NAME --out docs/studies/findings` writes all three."""
    found = Finding.load(FOLDER / f"{name}.json")
    assert "quick" not in found.settings
    assert found.markdown() == (FOLDER / f"{name}.md").read_text()
    assert (FOLDER / f"{name}.svg").stat().st_size < 2_000_000
    assert set(json.loads((FOLDER / f"{name}.json").read_text())) >= {"claims", "data", "settings"}


def test_nothing_else_is_committed() -> None:
    assert {path.stem for path in FOLDER.glob("*.*")} - {"README"} == set(FINDINGS)


def test_cells_of_the_table_hold_any_text() -> None:
    found = Finding("x", "T", (), "S", (Claim("a|b\nc", "1", "2", True),), {"n": 1})
    assert "| a\\|b c | 1 | 2 | yes |" in found.markdown()
    assert "settings: n 1." in found.markdown()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ArgumentError, match="name: the findings are"):
        finding.run("nothing")
