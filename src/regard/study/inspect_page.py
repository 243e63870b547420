"""An inspection as one HTML page that needs nothing else."""

from importlib.resources import files
from typing import TYPE_CHECKING

from regard.errors import require
from regard.study import png

if TYPE_CHECKING:
    from regard.study.inspect import Inspection

_TEMPLATE = "inspect.html.jinja"
#: what could end the data's element or begin another
_UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def render(inspection: "Inspection") -> str:
    """The page. Everything that comes from the model, the text or a file is escaped.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "write reports")
    source = files("regard.study").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(
        i=inspection,
        heads=sum(unit.head is not None for unit in inspection.units),
        data=inspection.to_json().translate(_UNSAFE),
        palette=["rgb({}, {}, {})".format(*colour) for colour in (png.NOTHING, *png.colours(255))],
        smallest=f"{png.SMALLEST:.2%}",
    )
