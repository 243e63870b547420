"""What the inspection of a text and that of a picture have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol


class Unit(Protocol):
    """A head or, where `head` is None, the mean over a layer's heads."""

    @property
    def layer(self) -> int: ...
    @property
    def head(self) -> int | None: ...
    @property
    def role(self) -> str | None: ...


class Inspected:
    """Heads and their means, and a page that shows them."""

    #: what a head may mostly do, and how that is decided
    ROLES: ClassVar[Mapping[str, str]]
    units: Sequence[Unit]

    @property
    def layers(self) -> list[int]:
        """Their indices in the model."""
        return [unit.layer for unit in self.units if unit.head is None]

    def report(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else.

        Raises:
            MissingExtra: plotly or jinja2 is not installed.
        """
        from regard.study.inspect_page import render

        inspection: Any = self  # one of the kinds that a page is made for
        Path(path).write_text(render(inspection), encoding="utf-8")
