"""The figures of an inspection's page, as plotly's dictionaries; colours come from a template for light or dark."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regard.study import png
from regard.study.inspected import Unit

Figure = dict[str, Any]

#: what the page's style sheet and the figures share
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#f7f8fb", "card": "#ffffff", "text": "#171a21", "soft": "#5d6675", "line": "#e2e5ec",
        "tile": "#e9ecf2", "accent": "#3451c6", "heat": "#e4572e",
    },
    "dark": {
        "page": "#0f1116", "card": "#181b22", "text": "#e9ebf1", "soft": "#9aa3b4", "line": "#2b303b",
        "tile": "#272c37", "accent": "#93a8ff", "heat": "#ff7a4d",
    },
}  # fmt: skip
#: from little to all of the attention
_RAMPS = {
    "light": ("#eef0f6", "#fde0b8", "#fcae6b", "#ee6a50", "#b5307a", "#5c1a7d", "#260a45"),
    "dark": ("#232633", "#3d1f63", "#7a2482", "#bd3977", "#ee6b52", "#fdb366", "#fdf3c3"),
}
_CATEGORIES = {
    "light": ("#8a6a4f", "#2f7bf0", "#259a5c", "#9aa4b8", "#d99409", "#9b59e6", "#17a3a8", "#dce0e9"),
    "dark": ("#b08a68", "#5b9bff", "#3dbb78", "#6b7690", "#e5ac33", "#b57bf5", "#35c3c6", "#343a49"),
}
#: over a picture, dim where little is looked at
_OVERLAY = (
    "rgba(8,6,24,.62)", "rgba(70,20,110,.6)", "rgba(180,40,120,.56)", "rgba(250,110,70,.55)", "rgba(255,225,120,.62)",
)  # fmt: skip
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_SHARES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Measure:
    """A number to colour the heads by: an attribute of a unit, as it reads, and where the colours end (None: at the
    largest there is). A logarithmic one counts from 1."""

    attribute: str
    caption: str
    show: Callable[[float], str]
    logarithmic: bool = False
    highest: float | None = None


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def named(unit: Unit) -> str:
    return f"layer {unit.layer}, " + ("mean of its heads" if unit.head is None else f"head {unit.head}")


def template(theme: str, roles: int) -> Figure:
    """What depends on the theme."""
    colours = THEMES[theme]
    stepped = (*role_colours(theme, roles), colours["tile"])
    axis = {
        "showgrid": False, "zeroline": False, "showline": False, "ticks": "", "fixedrange": True,
        "title": {"standoff": 6}, "automargin": True,
    }  # fmt: skip
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": _FONT, "size": 12, "color": colours["soft"]},
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"autocolorscale": False, "colorscale": _scale(_RAMPS[theme])},
            "coloraxis2": {"autocolorscale": False, "colorscale": _steps(stepped)},
            "hoverlabel": {
                "bgcolor": colours["card"], "bordercolor": colours["soft"], "align": "left",
                "font": {"family": _FONT, "size": 12.5, "color": colours["text"]},
            },
            "shapedefaults": {"line": {"color": colours["text"], "width": 2}},
        }
    }  # fmt: skip


def role_colours(theme: str, count: int) -> tuple[str, ...]:
    """Of the roles in their order; the last is the one that says nothing."""
    return (*_CATEGORIES[theme][: count - 1], _CATEGORIES[theme][-1])


def rows(units: Sequence[Unit]) -> list[list[int]]:
    """By layer, the indices of its heads and, last, of their mean."""
    found: dict[int, list[int]] = {}
    for at, unit in enumerate(units):
        found.setdefault(unit.layer, []).append(at)
    return list(found.values())


def overview(
    units: Sequence[Unit], facts: Sequence[str], roles: Sequence[str], measures: Mapping[str, Measure]
) -> dict[str, Figure]:
    """Layers × heads, and the layers' means beside them, coloured by role or by one of the measures.

    A cell's `customdata` is the index of its unit.
    """
    by_layer = rows(units)
    heads = max(map(len, by_layer)) - 1
    padded = [[*line[:-1], *[None] * (heads + 1 - len(line))] for line in by_layer]
    places: list[tuple[Sequence[Sequence[int | None]], list[float]]] = [
        (padded, [h - 0.5 for h in range(heads + 1)]),
        ([line[-1:] for line in by_layer], [heads - 0.2, heads + 0.8]),
    ]
    every = max(1, math.ceil(heads / 16))
    frame = {
        "xaxis": {
            "side": "top", "range": [-0.5, heads + 0.8], "tickvals": [*range(0, heads, every), heads + 0.3],
            "ticktext": [*map(str, range(0, heads, every)), "mean"],
        },
        "yaxis": {
            "range": [len(by_layer) - 0.5, -0.5], "title": {"text": "layer"}, "tickfont": {"size": 11},
            "tickvals": list(range(len(by_layer))), "ticktext": [str(units[line[0]].layer) for line in by_layer],
        },
    }  # fmt: skip

    def figure(values: Sequence[float], colours: str, axis: Figure, below: int) -> Figure:
        def of(what: Sequence[Any], cells: Sequence[Sequence[int | None]]) -> list[list[Any]]:
            return [[None if at is None else what[at] for at in line] for line in cells]

        traces = [
            {
                "type": "heatmap", "x": edges, "y": [i - 0.5 for i in range(len(by_layer) + 1)], "z": of(values, cells),
                "customdata": of(range(len(units)), cells), "text": of(facts, cells), "coloraxis": colours,
                "hovertemplate": "%{text}<extra></extra>", "xgap": 2, "ygap": 2, "hoverongaps": False,
            }
            for cells, edges in places
        ]  # fmt: skip
        return {"data": traces, "layout": {**frame, colours: axis, "margin": {"l": 44, "r": 4, "t": 26, "b": below}}}

    codes = [len(roles) if unit.role is None else roles.index(unit.role) for unit in units]
    found = {"role": figure(codes, "coloraxis2", {"cmin": -0.5, "cmax": len(roles) + 0.5, "showscale": False}, 4)}
    for name, measure in measures.items():
        values = [getattr(unit, measure.attribute) for unit in units]
        shown = [math.log1p(value) for value in values] if measure.logarithmic else values
        found[name] = figure(shown, "coloraxis", _measured(measure, max(values)), 54)
    return found


def pattern(edges: Sequence[float], what: str, *, ticks: bool = True) -> Figure:
    """Queries × keys; the page fills in `z`, the logarithm of shares, and `text`."""
    axis = {"showticklabels": ticks, "range": [edges[0], edges[-1]], "constrain": "domain"}
    return {
        "data": [_shares(x=list(edges), y=list(edges))],
        "layout": {
            "coloraxis": _share_axis(),
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "xaxis": {**axis, "title": {"text": f"{what} that are looked at"}},
            "yaxis": {
                **axis, "range": [edges[-1], edges[0]], "title": {"text": f"{what} that look"}, "scaleanchor": "x",
            },
        },
    }  # fmt: skip


def flow(labels: Sequence[str]) -> Figure:
    """Parts × parts with the shares written in; the page fills in `z`, `text` and the labels."""
    places = list(range(len(labels)))
    return {
        "data": [
            {
                **_shares(x=places, y=places, gap=2),
                "texttemplate": "%{text}", "hovertemplate": "%{hovertext}<extra></extra>", "textfont": {"size": 12},
            }
        ],
        "layout": {
            "coloraxis": {"cmin": 0, "cmax": 1, "showscale": False},
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "xaxis": {"side": "top", "tickvals": places, "ticktext": [str(i + 1) for i in places]},
            "yaxis": {"autorange": "reversed", "tickvals": places},
        },
    }  # fmt: skip


def looks(layers: Sequence[int]) -> Figure:
    """Layers × tokens, of one query; the page fills in the tokens."""
    return {
        "data": [_shares(x=[], y=list(range(len(layers))), gap=1)],
        "layout": {
            "coloraxis": _share_axis(),
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "xaxis": {"side": "top", "tickangle": -60, "tickfont": {"size": 11}},
            "yaxis": {
                "autorange": "reversed", "title": {"text": "layer"}, "tickfont": {"size": 11},
                "tickvals": list(range(len(layers))), "ticktext": [str(layer) for layer in layers],
            },
        },
    }  # fmt: skip


def overlay(cells: tuple[int, int], count: int, columns: int) -> Figure:
    """Pictures with a heat map of shares on top, in rows of so many; the page fills in picture, `z`, `text` and titles.

    Each has its own colours, from 0 to its largest share. `aspect` is the whole figure's width over its height.
    """
    height, width = cells
    lines = math.ceil(count / columns)
    gap, room = (0.0, 0.0) if count == 1 else (0.012, 0.035 * columns)  # room for a title, in widths of a picture
    wide, high = (1 - gap * (columns - 1)) / columns, 1 / lines
    title = high * room / (height / width + room)
    data: list[Figure] = []
    titles: list[Figure] = []
    pictures: list[Figure] = []
    layout: Figure = {"margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "annotations": titles, "images": pictures}
    for at in range(count):
        line, column = divmod(at, columns)
        left, bottom = column * (wide + gap), 1 - (line + 1) * high
        suffix = "" if at == 0 else str(at + 1)
        x, y = f"x{suffix}", f"y{suffix}"
        axis = {"showticklabels": False, "constrain": "domain"}
        layout[f"xaxis{suffix}"] = {**axis, "domain": [left, left + wide], "range": [-0.5, width - 0.5], "anchor": y}
        layout[f"yaxis{suffix}"] = {
            **axis, "domain": [bottom, bottom + high - title], "range": [height - 0.5, -0.5],
            "scaleanchor": x, "anchor": x,
        }  # fmt: skip
        titles.append({
            "xref": "paper", "yref": "paper", "x": left, "y": bottom + high - title, "text": "", "showarrow": False,
            "xanchor": "left", "yanchor": "bottom", "borderpad": 0, "font": {"size": 11},
        })  # fmt: skip
        pictures.append({
            "xref": x, "yref": y, "x": -0.5, "y": -0.5, "sizex": width, "sizey": height,
            "sizing": "stretch", "layer": "below",
        })  # fmt: skip
        data.append({
            "type": "heatmap", "z": [], "xaxis": x, "yaxis": y, "zmin": 0, "showscale": False,
            "colorscale": _scale(_OVERLAY), "hovertemplate": "%{text}<extra></extra>", "zsmooth": False,
        })  # fmt: skip
    return {"data": data, "layout": layout, "aspect": columns / lines / (height / width + room)}


def _shares(x: Sequence[float], y: Sequence[float], gap: int = 0) -> Figure:
    return {
        "type": "heatmap", "x": x, "y": y, "z": [], "text": [], "coloraxis": "coloraxis", "hoverongaps": False,
        "hovertemplate": "%{text}<extra></extra>", "xgap": gap, "ygap": gap,
    }  # fmt: skip


def _share_axis() -> Figure:
    return {
        "cmin": math.log10(png.SMALLEST),
        "cmax": 0,
        "colorbar": {
            **_bar("share of attention, logarithmic"),
            "tickvals": [math.log10(share) for share in _SHARES],
            "ticktext": [f"{share:.4%}".rstrip("%").rstrip("0").rstrip(".") + "%" for share in _SHARES],
        },
    }


def _measured(measure: Measure, largest: float) -> Figure:
    high = measure.highest or largest or 1.0
    if measure.logarithmic:
        ticks = [0.0, *(t for t in (1, 3, 10, 30, 100, 300, 1000, 3000) if t < 0.8 * high), high]
        places, high = [math.log1p(t) for t in ticks], math.log1p(high)
    else:
        ticks = [high * i / 4 for i in range(5)]
        places = ticks
    bar = {**_bar(measure.caption), "tickvals": places, "ticktext": [measure.show(t) for t in ticks]}
    return {"cmin": 0, "cmax": high, "colorbar": bar}


def _bar(title: str) -> Figure:
    """A horizontal colour bar below the axes."""
    return {
        "orientation": "h", "thickness": 9, "len": 0.86, "x": 0.5, "y": 0, "yref": "container", "yanchor": "bottom",
        "outlinewidth": 0, "tickfont": {"size": 11},
        "title": {"text": f"{title}<br>&nbsp;", "side": "top", "font": {"size": 11}},
    }  # fmt: skip


def _scale(colours: Sequence[str]) -> list[list[Any]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _steps(colours: Sequence[str]) -> list[list[Any]]:
    """A scale of equally wide plain colours."""
    n = len(colours)
    return [[at / n, colour] for i, colour in enumerate(colours) for at in (i, i + 1)]
