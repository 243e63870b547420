"""The studies in docs/ are what their cells and settings say."""

import json
from pathlib import Path

import pytest

from regard.study import sequence, sequence_page, vision, vision_page
from regard.study.cells import Cell

FOLDER = Path(__file__).parents[2] / "docs" / "studies"
STUDIES = {
    "sequence": (sequence, sequence_page, sequence.all_mixers),
    "vision": (vision, vision_page, vision.all_backbones),
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_table_is_made_of_the_cells(name) -> None:
    runner, pages, names = STUDIES[name]
    folder = FOLDER / name
    found = [Cell(**json.loads(path.read_text())) for path in sorted(folder.glob("*--*.json"))]
    order = {mixer: i for i, mixer in enumerate(names())}
    assert {cell.mixer for cell in found} <= set(order)
    assert not [cell for cell in found if cell.error]
    tasks = [task.name for task in runner.TASKS]
    places = {task: i for i, task in enumerate([*tasks, "cost"])}
    cells = sorted(found, key=lambda cell: (order[cell.mixer], places[cell.task]))
    written = (folder / "table.md").read_text()
    assert _without_machine(pages.markdown(cells, runner.Settings(), runner.TASKS)) == _without_machine(written)


def _without_machine(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("- Machine:"))
