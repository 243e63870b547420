"""Writes the page of every working system, and the index of findings: ``python -m regard.catalog.write_pages docs``."""

import sys
from collections.abc import Mapping
from pathlib import Path

from regard import catalog
from regard.catalog.findings import FINDINGS
from regard.catalog.page import page


def pages() -> dict[str, str]:
    """File name to contents, with an index."""
    working = catalog.systems(status="works")
    files = {f"{system.slug}.md": page(system) for system in working}
    rows = [f"| [{s.slug}]({s.slug}.md) | {s.name} | {s.family} | {s.paper} |" for s in working]
    head = ["# The systems that work", "", "| slug | system | family | paper |", "|---|---|---|---|"]
    return {"README.md": "\n".join([*head, *rows]) + "\n", **files}


def findings_index() -> str:
    """The findings with what they show and the systems that they are about."""
    head = [
        "# Findings",
        "",
        "What publications claim, beside what is measured here: each is made by `regard study NAME`.",
        "",
        "| finding | what it shows | systems |",
        "|---|---|---|",
    ]
    working = catalog.systems(status="works")
    rows = []
    for name, line in FINDINGS.items():
        about = ", ".join(f"[{s.slug}](../../systems/{s.slug}.md)" for s in working if s.finding == name)
        rows.append(f"| [{name}]({name}.md) | {line} | {about} |")
    return "\n".join([*head, *rows]) + "\n"


def replace_files(folder: Path, suffix: str, files: Mapping[str, str]) -> None:
    """Write the files, and remove others with that suffix that the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*{suffix}"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)


def main(docs: Path) -> None:
    written = pages()
    replace_files(docs / "systems", ".md", written)
    (docs / "studies" / "findings" / "README.md").write_text(findings_index())
    print(f"{len(written)} pages in {docs / 'systems'}, and the index of findings")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
