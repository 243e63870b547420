"""A finding: what a publication claims beside what was measured here, as JSON, Markdown and a figure.

Each is a module in `study/findings`, named after the finding, with

    run(*, seed=0, quick=False, on_progress=None) -> Finding    # what `regard study NAME` does
    draw(finding) -> matplotlib.figure.Figure                    # from its data alone
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from regard.catalog.findings import FINDINGS
from regard.errors import ArgumentError, require
from regard.study.machine import Machine

#: called with what is being done, steps done and their number
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Claim:
    """One quantity.

    Attributes:
        quantity: what was measured, with its unit.
        expected: what the publication says or predicts, in a few words.
        measured: what came out, with its uncertainty where there is one.
        holds: whether that agrees; None where it is no yes or no.
    """

    quantity: str
    expected: str
    measured: str
    holds: bool | None = None


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Attributes:
        name: of the study.
        title: one line.
        systems: slugs of the systems that it is about.
        summary: what was done, on which weights and data, and what came out, in a paragraph or several.
        claims: the table.
        settings: what it ran with, the seed included.
        data: the numbers behind the figure: anything that JSON holds.
    """

    name: str
    title: str
    systems: tuple[str, ...]
    summary: str
    claims: tuple[Claim, ...]
    settings: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The page, with the figure beside it by name."""
        words = {True: "yes", False: "no", None: ""}
        rows = (
            f"| {_cell(c.quantity)} | {_cell(c.expected)} | {_cell(c.measured)} | {words[c.holds]} |"
            for c in self.claims
        )
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return "\n".join(
            [
                f"# {self.title}",
                "",
                self.summary.strip(),
                "",
                f"![{self.title}]({self.name}.svg)",
                "",
                "| quantity | expected | measured | holds |",
                "|---|---|---|---|",
                *rows,
                "",
                f"Made by `regard study {self.name}`; settings: {settings}.",
                "",
            ]
        )

    def save(self, folder: str | Path) -> tuple[Path, Path, Path]:
        """Write NAME.json, NAME.md and NAME.svg into the folder, and return their paths.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        paths = [Path(folder) / f"{self.name}.{suffix}" for suffix in ("json", "md", "svg")]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(self.markdown(), encoding="utf-8")
        matplotlib = require("matplotlib", "draw the figure")
        # text stays text, and the same data gives the same file
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            figure = module(self.name).draw(self)
            figure.savefig(paths[2], format="svg", metadata={"Date": None}, bbox_inches="tight")
        return paths[0], paths[1], paths[2]

    @classmethod
    def load(cls, path: str | Path) -> "Finding":
        """What `save` wrote as NAME.json."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        claims = tuple(Claim(**claim) for claim in found.pop("claims"))
        return cls(systems=tuple(found.pop("systems")), claims=claims, **found)


def module(name: str) -> ModuleType:
    """The module that makes a finding.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name not in FINDINGS:
        raise ArgumentError(f"name: the findings are {', '.join(FINDINGS)}; got {name!r}")
    return import_module(f"regard.study.findings.{name.replace('-', '_')}")


def run(name: str, *, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Make a finding anew.

    Args:
        seed: of whatever is drawn.
        quick: a run of seconds, to see that it works; its numbers mean little.
        on_progress: called with what is being done, steps done and their number.

    Raises:
        ArgumentError: there is none of that name.
        MissingExtra: an optional package is needed and not there.
    """
    found: Finding = module(name).run(seed=seed, quick=quick, on_progress=on_progress)
    versions = Machine.here(torch.device("cpu")).versions
    about = {"seed": seed, **({"quick": True} if quick else {}), **found.settings}
    return Finding(**{**vars(found), "settings": {**about, "torch": versions["torch"]}})


def _cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
