"""Reads `systems.toml` into `System` records."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, resources
from types import MappingProxyType
from typing import Any

from regard.catalog.findings import FINDINGS
from regard.errors import ArgumentError, Unsupported

KINDS = ("mechanism", "mask", "model", "cache", "intervention", "probe", "task", "recipe", "parallel")
FAMILIES = (
    "diffusion",
    "generation",
    "language",
    "multimodal",
    "probes",
    "sequence",
    "vision",
    "vision-tasks",
    "vision-language",
)
STATUSES = ("works", "planned")


@dataclass(frozen=True, kw_only=True)
class System:
    """One published system.

    Attributes:
        slug: its name in regard.
        name: the name its authors use.
        title: title of the paper.
        kinds: what it is made of, out of `KINDS`; empty where there is nothing to run.
        family: what it is for, one of `FAMILIES`.
        status: "works" or "planned".
        summary: what it does, in one sentence.
        year: of the first public version; None without a paper.
        arxiv: the paper's arXiv identifier.
        venue: where it was published.
        official: the authors' code, owner/name on GitHub.
        object: what implements it, as "module:attribute"; present exactly when it works.
        parts: further classes of the same publication by name, such as the network around a mechanism.
        models: names of published configurations; one of the classes above has each in its ``sizes``.
        finding: name of the finding that shows it, out of `regard.catalog.findings`.
    """

    slug: str
    name: str
    title: str
    kinds: tuple[str, ...]
    family: str
    status: str
    summary: str
    year: int | None = None
    arxiv: str | None = None
    venue: str | None = None
    official: str | None = None
    object: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    finding: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("family", self.family, FAMILIES), ("status", self.status, STATUSES)):
            if value not in known:
                raise ArgumentError(f"system {self.slug}: {name} is {value!r}, expected one of {', '.join(known)}")
        if unknown := set(self.kinds) - set(KINDS):
            raise ArgumentError(f"system {self.slug}: kinds {sorted(unknown)} are none of {', '.join(KINDS)}")
        if self.finding is not None and self.finding not in FINDINGS:
            raise ArgumentError(f"system {self.slug}: finding {self.finding!r} is none of {', '.join(FINDINGS)}")
        if self.works != (self.object is not None):
            raise ArgumentError(f"system {self.slug}: status {self.status!r} with object {self.object!r}")

    @property
    def works(self) -> bool:
        return self.status == "works"

    @property
    def paper(self) -> str:
        """The shortest reference: the arXiv number, or the venue."""
        return f"arXiv:{self.arxiv}" if self.arxiv else self.venue or ""

    def load(self, part: str | None = None) -> Any:
        """Import what implements the system, or one of its parts.

        Raises:
            ArgumentError: there is no such part.
            Unsupported: the system is planned.
        """
        if self.object is None:
            raise Unsupported(f"{self.slug} is planned, nothing in regard implements it yet")
        if part is not None and part not in self.parts:
            raise ArgumentError(f"{self.slug} has no part {part!r}; it has: {', '.join(self.parts) or 'none'}")
        module, _, attribute = (self.object if part is None else self.parts[part]).partition(":")
        return getattr(import_module(module), attribute)

    def load_model(self, name: str) -> tuple[Any, dict[str, Any]]:
        """The class of a published configuration, and the configuration."""
        for part in (None, *self.parts):
            found = self.load(part)
            if name in (sizes := getattr(found, "sizes", {})):
                return found, dict(sizes[name])
        raise ArgumentError(f"{self.slug} has no model {name!r}; it has: {', '.join(self.models) or 'none'}")


def systems(*, kind: str | None = None, family: str | None = None, status: str | None = None) -> tuple[System, ...]:
    """All systems, or those of one kind, family and status, in catalogue order.

    Raises:
        ArgumentError: no system can have that kind, family or status.
    """
    for argument, value, known in (("kind", kind, KINDS), ("family", family, FAMILIES), ("status", status, STATUSES)):
        if value is not None and value not in known:
            raise ArgumentError(f"unknown {argument} {value!r}; {_suggest(value, known)}")
    return tuple(
        system
        for system in _read().values()
        if (kind is None or kind in system.kinds)
        and family in (None, system.family)
        and status in (None, system.status)
    )


def names(*, kind: str | None = None, family: str | None = None, status: str | None = None) -> tuple[str, ...]:
    """The slugs of `systems(...)`."""
    return tuple(system.slug for system in systems(kind=kind, family=family, status=status))


def get(slug: str) -> System:
    """The system called `slug`.

    Raises:
        ArgumentError: there is none; the message suggests close names.
    """
    catalogue = _read()
    if slug not in catalogue:
        raise ArgumentError(f"unknown system {slug!r}; {_suggest(slug, tuple(catalogue))}")
    return catalogue[slug]


def model_names() -> dict[str, str]:
    """Names of published configurations, such as ``mala-tiny``, and the slug of the system each belongs to."""
    return {name: system.slug for system in systems() for name in system.models}


@cache
def _read() -> MappingProxyType[str, System]:
    with resources.files("regard.catalog").joinpath("systems.toml").open("rb") as file:
        entries = tomllib.load(file)["system"]
    catalogue: dict[str, System] = {}
    for entry in entries:
        system = System(**{**entry, **{key: tuple(entry.get(key, ())) for key in ("kinds", "models")}})
        if system.slug in catalogue:
            raise ArgumentError(f"system {system.slug} stands twice in systems.toml")
        catalogue[system.slug] = system
    return MappingProxyType(catalogue)


def _suggest(value: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(value.lower(), known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"expected one of {', '.join(known)}" if len(known) < 12 else "`regard list` shows all"
