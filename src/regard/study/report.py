"""A comparison as one HTML page that needs nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from regard.errors import require
from regard.study import png, words
from regard.study.charts import Point, Scatter, scatter
from regard.study.records import Comparison, Picture, Result

_TEMPLATE = "report.html.jinja"
#: readable on white and on black
_COLOURS = (
    "#7c8aa0",
    "#e4572e",
    "#d99a06",
    "#2f9e62",
    "#3b82f6",
    "#a264e8",
    "#e0529c",
    "#12a5a0",
    "#8d6e52",
    "#9aa21b",
)
_MIB = 2**20


@dataclass(frozen=True)
class _Image:
    """A picture of one layer: the prompt's rows, the decoded rows, and where the passkey stands (0 to 1 across)."""

    layer: int
    prompt: str
    decoded: str
    columns: int
    prompt_rows: int
    decoded_rows: int
    target: float | None
    legend: str


def render(comparison: Comparison) -> str:
    """The page. Everything that comes from the model, the text or a file is escaped.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "write reports")
    source = files("regard.study").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    ran = [result for result in comparison.results if result.error is None]
    colours = {id(result): _COLOURS[i % len(_COLOURS)] for i, result in enumerate(comparison.results)}
    return environment.from_string(source).render(
        c=comparison,
        dense=comparison.dense,
        words=words,
        notes=words.notes(comparison),
        colour_of=lambda result: colours[id(result)],
        plots=_plots(comparison, ran, lambda result: colours[id(result)]),
        pictured=[(result, [_image(picture) for picture in result.pictures]) for result in ran if result.pictures],
        ramp=["rgb({}, {}, {})".format(*colour) for colour in png.colours(9)],
        nothing="rgb({}, {}, {})".format(*png.NOTHING),
        smallest=f"{png.SMALLEST:.2%}",
    )


def _plots(comparison: Comparison, ran: list[Result], colour_of: Callable[[Result], str]) -> list[Scatter]:
    s = comparison.settings

    def points(x_of: Callable[[Result], float | None]) -> list[Point]:
        found = []
        for result in ran:
            x, y = x_of(result), result.perplexity
            if x is not None and y is not None:
                fill = result.recalled / len(result.recalls) if result.recalls else None
                details = f"{result.method}: perplexity {words.number(y)}, passkeys {words.recalled(result)}"
                found.append(Point(result.name, colour_of(result), x, y, fill, details))
        return found

    quality = f"perplexity of the next {s.continuation} tokens (lower is better)"
    memory = points(lambda r: None if r.cache_bytes is None else r.cache_bytes / _MIB)
    return [
        scatter("Quality against memory", "KV cache after the prompt, MiB", quality, memory),
        scatter(
            "Quality against time",
            f"reading {s.context:,} and decoding {s.continuation} tokens, dense = 1",
            quality,
            points(lambda r: _time(r, comparison)),
        ),
    ]


def _time(result: Result, comparison: Comparison) -> float | None:
    """Time for the prompt and the text after it, over dense: both ratios, weighted by what dense takes for either."""
    dense = comparison.dense
    if result.prefill_ratio is None or result.decode_ratio is None:
        return None
    if dense.prefill_seconds is None or dense.decode_seconds is None:
        return None
    after = dense.decode_seconds * comparison.settings.continuation
    return (result.prefill_ratio * dense.prefill_seconds + result.decode_ratio * after) / (
        dense.prefill_seconds + after
    )


def _image(picture: Picture) -> _Image:
    length = picture.edges[-1]
    columns = len(picture.edges) - 1
    prompt = [row[:columns] for row in picture.prompt]
    return _Image(
        layer=picture.layer,
        prompt=png.data_uri(prompt),
        decoded=png.data_uri(picture.decoded),
        columns=columns,
        prompt_rows=len(prompt),
        decoded_rows=len(picture.decoded),
        target=None if picture.target is None else picture.target / length * columns / (columns + 1),
        legend="".join(picture.tokens),
    )
