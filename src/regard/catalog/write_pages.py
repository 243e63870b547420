"""Writes the page of every working system: ``python -m regard.catalog.write_pages docs/systems``."""

import sys
from collections.abc import Mapping
from pathlib import Path

from regard import catalog
from regard.catalog.page import page


def pages() -> dict[str, str]:
    """File name to contents, with an index."""
    working = catalog.systems(status="works")
    files = {f"{system.slug}.md": page(system) for system in working}
    rows = [f"| [{s.slug}]({s.slug}.md) | {s.name} | {s.family} | {s.paper} |" for s in working]
    head = ["# The systems that work", "", "| slug | system | family | paper |", "|---|---|---|---|"]
    return {"README.md": "\n".join([*head, *rows]) + "\n", **files}


def replace_files(folder: Path, suffix: str, files: Mapping[str, str]) -> None:
    """Write the files, and remove others with that suffix that the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*{suffix}"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)


def main(folder: Path) -> None:
    written = pages()
    replace_files(folder, ".md", written)
    print(f"{len(written)} pages in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
