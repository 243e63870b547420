"""An inspection as one HTML page that needs nothing else: plotly draws, and a little script connects the figures."""

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

from torch import Tensor

from regard.errors import require
from regard.study import inspect_figures as figures
from regard.study import inspected, png
from regard.study.inspect import Inspection, Unit
from regard.study.inspect_figures import Measure, percent
from regard.study.inspect_image import ImageInspection, ImageUnit

#: what could end the data's element or begin another
_UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}

MEASURES = {
    "entropy": Measure("entropy", "nats, mean over queries", lambda x: f"{x:.1f}"),
    "distance": Measure("distance", "tokens from query to key, logarithmic", lambda x: f"{x:.0f}", logarithmic=True),
    "first token": Measure("first", "share of attention on the first token", percent, highest=1.0),
    "repetition": Measure("repetition", "share on what followed the token's earlier occurrences", percent, highest=1.0),
}
IMAGE_MEASURES = {
    "entropy": Measure("entropy", "nats, mean over queries", lambda x: f"{x:.1f}"),
    "distance": Measure("distance", "patches from query to key", lambda x: f"{x:.1f}"),
    "class token": Measure("first", "share of the patches' attention on the tokens before them", percent, highest=1.0),
    "nearby": Measure("near", "share of attention within two patches", percent, highest=1.0),
    "same for all": Measure("same", "share of all attention on the four patches that get most", percent, highest=1.0),
}
#: a page opens with the first head of the first of these roles that occurs
TELLING = ("repetition", "previous token", "row", "column", "nearby", "broad")


def render(inspection: Inspection | ImageInspection) -> str:
    """The page. Everything that comes from the model, the text or a file is escaped.

    Raises:
        MissingExtra: plotly or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "write reports")
    library = require("plotly.offline", "write reports").get_plotlyjs()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    roles, shown = inspection.ROLES, data(inspection)
    units: Sequence[inspected.Unit] = inspection.units
    reads = "text" if isinstance(inspection, Inspection) else "image"
    return environment.from_string(_source("inspect.html.jinja")).render(
        i=inspection,
        reads=reads,
        heads=sum(unit.head is not None for unit in units),
        parts=len(shown["parts"]),
        measures=list(shown["overview"]),
        data=_embedded(shown),
        roles=[(role, about, sum(unit.role == role for unit in units)) for role, about in roles.items()],
        themes=figures.THEMES,
        role_colours={theme: figures.role_colours(theme, len(roles)) for theme in figures.THEMES},
        library=library.replace("</script", "<\\/script"),
        style=_source("inspect.css"),
        scripts=[_source("inspect.js"), _source(f"inspect_{reads}.js")],
    )


def data(inspection: Inspection | ImageInspection) -> dict[str, Any]:
    """What the page's scripts read: figures for plotly, and shares as `levels`."""
    i = inspection
    units: Sequence[inspected.Unit] = i.units
    return {
        "themes": {theme: figures.template(theme, len(i.ROLES)) for theme in figures.THEMES},
        "names": [figures.named(unit) for unit in units],
        "rows": figures.rows(units),
        "start": next((at for role in TELLING for at, unit in enumerate(units) if unit.role == role), 0),
        "smallest": png.SMALLEST,
        "patterns": levels(i.patterns),
        "flows": levels(i.flow),
        "received": levels(i.received),
        **(_text(i) if isinstance(i, Inspection) else _image(i)),
    }


def _text(i: Inspection) -> dict[str, Any]:
    parts = ["".join(i.tokens[a:b]) for a, b in pairwise(i.spans)]

    def lines(unit: Unit) -> list[str]:
        return [
            f"entropy {unit.entropy:.2f} nats",
            f"mean distance {unit.distance:.0f} tokens",
            f"{percent(unit.first)} on the first token",
            f"{percent(unit.repetition)} on repetitions",
        ]

    return {
        **_facts(i.units, list(map(lines, i.units)), i.ROLES, MEASURES),
        "pattern": figures.pattern(i.edges, "tokens"),
        "flow": figures.flow(parts),
        "looks": figures.looks(i.layers),
        "groups": [f"token {a}" if b == a + 1 else f"tokens {a} to {b - 1}" for a, b in pairwise(i.edges)],
        "parts": [f"{at + 1}  {_excerpt(part)}" for at, part in enumerate(parts)],
        "tokens": i.tokens,
        "kept": i.top.shape[-1],
        "top": _base64(i.top.short()),
        "shares": levels(i.shares),
    }


def _image(i: ImageInspection) -> dict[str, Any]:
    def lines(unit: ImageUnit) -> list[str]:
        return [
            f"entropy {unit.entropy:.2f} nats",
            f"mean distance {unit.distance:.1f} patches",
            *([f"{percent(unit.first)} on the class token"] if i.leading else []),
            f"{percent(unit.near)} within two patches",
            f"{percent(unit.same)} on the same four patches",
        ]

    measures = {name: m for name, m in IMAGE_MEASURES.items() if i.leading or m.attribute != "first"}
    leading = ["class token", *(f"token {at}" for at in range(1, i.leading))][: i.leading]
    (height, width), (rows, columns) = i.grid, i.cells
    together = -(-height // rows)

    def cell(row: int, column: int) -> str:
        if together == 1:
            return f"patch in row {row + 1}, column {column + 1}"
        (top, left) = row * together, column * together
        bottom, right = min(height, top + together), min(width, left + together)
        return f"patches in rows {top + 1} to {bottom}, columns {left + 1} to {right}"

    heads = max(map(len, figures.rows(i.units))) - 1
    return {
        **_facts(i.units, list(map(lines, i.units)), i.ROLES, measures),
        "pattern": figures.pattern(range(i.leading + rows * columns + 1), "tokens, row by row", ticks=False),
        "flow": figures.flow(i.regions),
        "overlay": figures.overlay(i.cells, 1, 1),
        "panels": {
            "layers": [figures.overlay(i.cells, len(i.layers), _columns(len(i.layers), most)) for most in (6, 3)],
            "heads": [figures.overlay(i.cells, heads, _columns(heads, most)) for most in (6, 3)],
        },
        "groups": [*leading, *(cell(row, column) for row in range(rows) for column in range(columns))],
        "parts": [f"{at + 1}  {region}" for at, region in enumerate(i.regions)],
        "layers": i.layers,
        "leading": i.leading,
        "cells": i.cells,
        "picture": "data:image/jpeg;base64," + b64encode(i.picture).decode("ascii"),
    }


def _columns(count: int, most: int) -> int:
    """Of pictures side by side, so that the last line is full if that can be."""
    return next((columns for columns in range(most, most // 2, -1) if count % columns == 0), min(count, most))


def _facts(
    units: Sequence[inspected.Unit],
    lines: Sequence[Sequence[str]],
    roles: Mapping[str, str],
    measures: Mapping[str, Measure],
) -> dict[str, Any]:
    """What the page says of each head, and the overview of all."""
    hover, facts = [], []
    for unit, known in zip(units, lines, strict=True):
        role = [] if unit.role is None else [unit.role]
        hover.append("<br>".join([f"<b>{figures.named(unit)}</b>", *role, *known]))
        about = f"{unit.role.capitalize()}: {roles[unit.role]}. " if unit.role is not None else ""
        facts.append(about + "; ".join(known).capitalize() + ".")
    return {"facts": facts, "overview": figures.overview(units, hover, list(roles), measures)}


def levels(shares: Tensor) -> str:
    """Shares as bytes in base64: 0 for nothing, 1 to 255 logarithmically from `png.SMALLEST` to 1."""
    part = 1 - shares.clamp(min=1e-12).log10() / math.log10(png.SMALLEST)
    return _base64((1 + (part.clamp(0, 1) * 254).round()).where(shares > 0, 0).byte())


def _excerpt(text: str, longest: int = 64) -> str:
    words = " ".join(text.split())
    return words if len(words) <= longest else words[: longest - 1].rstrip() + "…"


def _embedded(data: dict[str, Any]) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, separators=(",", ":")).translate(_UNSAFE)


def _base64(tensor: Tensor) -> str:
    """Little-endian, as JavaScript's typed arrays are on the machines there are."""
    values = tensor.contiguous().numpy()
    return b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _source(name: str) -> str:
    return files("regard.study").joinpath(name).read_text(encoding="utf-8")
