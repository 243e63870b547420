"""The catalogue against its own rules, and its loader's answers and refusals."""

import re

import pytest

from regard import catalog, methods
from regard.catalog import System, loader
from regard.errors import ArgumentError, Unsupported

SYSTEMS = catalog.systems()


def entry(**changes: object) -> System:
    fields = {
        "slug": "example",
        "name": "Example",
        "title": "An example",
        "kinds": ("mask",),
        "family": "sequence",
        "status": "planned",
        "summary": "Does nothing.",
    }
    return System(**(fields | changes))


def test_every_system_is_there_once() -> None:
    assert len(SYSTEMS) == len(set(catalog.names())) == 155


@pytest.mark.parametrize("system", SYSTEMS, ids=[s.slug for s in SYSTEMS])
def test_entry_is_complete_and_well_formed(system: System) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system.slug)
    assert system.name
    assert system.title
    assert system.summary[0].isupper()
    assert system.summary.endswith(".")
    assert len(system.summary) <= 160
    if system.arxiv is None:
        assert system.year is None
        assert system.venue, "without an arXiv number the venue is the reference"
    else:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", system.arxiv)
        assert system.year == 2000 + int(system.arxiv[:2])
    if system.official is not None:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", system.official)


@pytest.mark.parametrize("field", ["slug", "name", "title", "arxiv", "summary"])
def test_entries_do_not_repeat_each_other(field: str) -> None:
    values = [v for s in SYSTEMS if (v := getattr(s, field)) is not None]
    assert sorted(values) == sorted(set(values))


def test_what_works_can_be_imported() -> None:
    """`works` is a promise about code: each such system's object must import, and be the method of that name."""
    for system in catalog.systems(status="works"):
        implementation = system.load()
        assert implementation.__doc__, f"{system.slug}: its implementation has no docstring to show"
        if system.slug in methods.names():
            assert implementation is methods.get(system.slug)


def test_a_works_entry_whose_object_is_missing_does_not_load() -> None:
    with pytest.raises(ModuleNotFoundError):
        entry(status="works", object="regard.methods.nowhere:Nothing").load()
    with pytest.raises(AttributeError):
        entry(status="works", object="regard.errors:Nothing").load()
    assert entry(status="works", object="regard.errors:ShapeError").load().__name__ == "ShapeError"


def test_planned_system_refuses_to_load() -> None:
    with pytest.raises(Unsupported, match="example is planned"):
        entry().load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "works"}, "status 'works' with object None"),
        ({"object": "regard.errors:ShapeError"}, "status 'planned' with object 'regard"),
        ({"status": "done"}, "status is 'done', expected one of works, planned"),
        ({"family": "audio"}, "family is 'audio'"),
        ({"kinds": ("mask", "magic")}, r"kinds \['magic'\]"),
    ],
)
def test_malformed_entries_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        entry(**changes)


def test_get_returns_the_paper() -> None:
    system = catalog.get("streaming-llm")
    assert system.title == "Efficient Streaming Language Models with Attention Sinks"
    assert system.paper == "arXiv:2309.17453"
    assert system.kinds == ("mask", "cache")
    assert system.official == "mit-han-lab/streaming-llm"
    assert catalog.get("diffusion-attention-control").paper.startswith("no paper")


@pytest.mark.parametrize(
    ("slug", "message"),
    [("h20", "unknown system 'h20'; did you mean h2o?"), ("", "`regard list` shows all"), ("H2O", "did you mean")],
)
def test_unknown_slug_names_close_ones(slug: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        catalog.get(slug)
    assert message in str(caught.value)


def test_filters_combine() -> None:
    caches = catalog.systems(kind="cache", family="language")
    assert {"h2o", "xkv", "streaming-llm"} <= {s.slug for s in caches}
    assert all("cache" in s.kinds and s.family == "language" for s in caches)
    works, planned = catalog.names(status="works"), catalog.names(status="planned")
    assert sorted(works + planned) == sorted(catalog.names())


@pytest.mark.parametrize(("argument", "value"), [("kind", "masks"), ("family", "text"), ("status", "done")])
def test_unknown_filter_is_refused(argument: str, value: str) -> None:
    with pytest.raises(ArgumentError, match=f"unknown {argument} '{value}'"):
        catalog.systems(**{argument: value})


def test_is_read_once() -> None:
    loader._read.cache_clear()
    catalog.get("h2o")
    assert loader._read.cache_info().misses == 1
    assert catalog.get("xkv") is catalog.get("xkv")
    assert loader._read.cache_info().misses == 1
