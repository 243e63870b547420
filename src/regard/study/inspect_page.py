"""An inspection as one HTML page that needs nothing else: plotly draws, and a little script connects the figures."""

import json
import math
from base64 import b64encode
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regard.errors import require
from regard.study import inspect_figures as figures
from regard.study import png
from regard.study.inspect_figures import Measure, percent

if TYPE_CHECKING:
    from regard.study.inspect import Inspection, Unit

#: what could end the data's element or begin another
_UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}

MEASURES = {
    "entropy": Measure("entropy", "nats, mean over queries", lambda x: f"{x:.1f}"),
    "distance": Measure("distance", "tokens from query to key, logarithmic", lambda x: f"{x:.0f}", logarithmic=True),
    "first token": Measure("first", "share of attention on the first token", percent, highest=1.0),
    "repetition": Measure("repetition", "share on what followed the token's earlier occurrences", percent, highest=1.0),
}

#: the page opens with the first head of the first of these roles that occurs
TELLING = ("repetition", "previous token", "nearby", "broad")


def render(inspection: "Inspection") -> str:
    """The page. Everything that comes from the model, the text or a file is escaped.

    Raises:
        MissingExtra: plotly or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "write reports")
    library = require("plotly.offline", "write reports").get_plotlyjs()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    roles = inspection.ROLES
    return environment.from_string(_source("inspect.html.jinja")).render(
        i=inspection,
        heads=sum(unit.head is not None for unit in inspection.units),
        data=_embedded(data(inspection)),
        measures=["role", *MEASURES],
        roles=[(role, about, sum(u.role == role for u in inspection.units)) for role, about in roles.items()],
        themes=figures.THEMES,
        role_colours={theme: figures.role_colours(theme, len(roles)) for theme in figures.THEMES},
        library=library.replace("</script", "<\\/script"),
        style=_source("inspect.css"),
        scripts=[_source("inspect.js"), _source("inspect_text.js")],
    )


def data(inspection: "Inspection") -> dict[str, Any]:
    """What the page's scripts read: figures for plotly, and shares as `levels`."""
    i, units = inspection, inspection.units
    parts = ["".join(i.tokens[a:b]) for a, b in zip(i.spans, i.spans[1:], strict=False)]
    hover = [f"<b>{figures.named(unit)}</b><br>{_lines(unit)}" for unit in units]
    return {
        "themes": {theme: figures.template(theme, len(i.ROLES)) for theme in figures.THEMES},
        "overview": figures.overview(units, hover, list(i.ROLES), MEASURES),
        "pattern": figures.pattern(i.edges, "tokens"),
        "flow": figures.flow(parts),
        "looks": figures.looks(i.layers),
        "names": [figures.named(unit) for unit in units],
        "facts": [_facts(unit, i.ROLES) for unit in units],
        "rows": figures.rows(units),
        "start": next((at for role in TELLING for at, unit in enumerate(units) if unit.role == role), 0),
        "groups": [
            f"token {a}" if b == a + 1 else f"tokens {a} to {b - 1}" for a, b in zip(i.edges, i.edges[1:], strict=False)
        ],
        "parts": [f"{at + 1}  {_excerpt(part)}" for at, part in enumerate(parts)],
        "smallest": png.SMALLEST,
        "patterns": levels(i.patterns),
        "flows": levels(i.flow),
        "received": levels(i.received),
        "tokens": i.tokens,
        "edges": i.edges,
        "kept": i.top.shape[-1],
        "top": _base64(i.top.short()),
        "shares": levels(i.shares),
    }  # fmt: skip


def levels(shares: Tensor) -> str:
    """Shares as bytes in base64: 0 for nothing, 1 to 255 logarithmically from `png.SMALLEST` to 1."""
    part = 1 - shares.clamp(min=1e-12).log10() / math.log10(png.SMALLEST)
    return _base64((1 + (part.clamp(0, 1) * 254).round()).where(shares > 0, 0).byte())


def _facts(unit: "Unit", roles: dict[str, str]) -> str:
    role = "" if unit.role is None else f"{unit.role.capitalize()}: {roles[unit.role]}. "
    return (
        f"{role}Entropy {unit.entropy:.2f} nats; mean distance {unit.distance:.0f} tokens; {percent(unit.first)} "
        f"on the first token; {percent(unit.repetition)} on repetitions."
    )


def _lines(unit: "Unit") -> str:
    return "<br>".join(
        (
            *([] if unit.role is None else [unit.role]),
            f"entropy {unit.entropy:.2f} nats",
            f"distance {unit.distance:.0f} tokens",
            f"first token {percent(unit.first)}",
            f"repetition {percent(unit.repetition)}",
        )
    )


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
