"""Pictures of what one position of an image sees: ``python -m regard.study.pictures docs/systems/pictures``."""

import html
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from regard import catalog
from regard.catalog.loader import System
from regard.catalog.page import example_arguments
from regard.catalog.write_pages import replace_files
from regard.mechanisms.grid.base import GridMechanism
from regard.mechanisms.grid.channel import ChannelAttention
from regard.mechanisms.grid.global_context import GlobalQueryGenerator, GlobalWindowAttention
from regard.mechanisms.grid.lass import LASS
from regard.mechanisms.grid.lsda import LSDAttention
from regard.mechanisms.grid.neighborhood import NeighborhoodAttention
from regard.mechanisms.grid.polyline import PolylinePathAttention
from regard.probes.reach import reach
from regard.study import png

QUERY = (4, 9)  # off centre, so that windows around the query and windows of a partition look different
_CELL, _GAP, _TITLE = 12, 24, 22


class _Sequence(nn.Module):
    """A mixer of sequences on the flattened grid."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.flatten(1, 2)).view_as(x)


class _WithGlobalQueries(nn.Module):
    """GC ViT's global attention with the queries it gets from the whole map."""

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.queries = GlobalQueryGenerator(dim, num_heads, window_size, num_downsamples=1)
        self.attention = GlobalWindowAttention(dim, num_heads, window_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.queries(x))


#: mixers beside those that a system's classes show with their example arguments
MORE: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "crossformer": {"attention, long": lambda: LSDAttention(64, 4, interval=2, mode="long")},
    "davit": {"channel": lambda: _Sequence(ChannelAttention(64, 4))},
    "dinat": {"attention, dilation 2": lambda: NeighborhoodAttention(64, 4, dilation=2)},
    "gc-vit": {"global": lambda: _WithGlobalQueries(64, 4, 7)},
    "generalized-neighborhood-attention": {
        "stride 4": lambda: NeighborhoodAttention(64, 4, stride=4),
        "causal rows": lambda: NeighborhoodAttention(64, 4, is_causal=(True, False)),
    },
    "ppma": {"attention, chunk": lambda: PolylinePathAttention(64, 4, form="chunk")},
    "segman": {"lass, global": lambda: LASS(64, 4, global_mode=True, image_size=14)},
}


def mixers(system: System) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """The grid mixers among the classes of a system, each with a name and a way to make it."""
    for part in (None, *system.parts):
        cls = system.load(part)
        if isinstance(cls, type) and issubclass(cls, GridMechanism):
            inputs = list(inspect.signature(cls.forward).parameters.values())[1:]
            if sum(p.default is p.empty for p in inputs) == 1:
                yield part or "default", partial(cls, **example_arguments(cls))
    yield from MORE.get(system.slug, {}).items()


def _opened(module: nn.Module) -> nn.Module:
    """With the norms that start at zero, so that a block begins as the identity, let through."""
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and not weight.any():
            nn.init.ones_(weight)
    return module


def picture(system: System, grid: tuple[int, int] = GridMechanism.example_grid) -> str | None:
    """An SVG with one panel per mixer of a system; None if it mixes no grids."""
    panels = []
    for name, make in mixers(system):
        torch.manual_seed(0)
        module = _opened(make()).eval()
        seen = reach(module, torch.randn(1, *grid, 64), QUERY)
        panels.append((name, (seen / seen.max()).tolist()))
    return _svg(panels, system.name) if panels else None


def _svg(panels: list[tuple[str, list[list[float]]]], title: str) -> str:
    height, width = len(panels[0][1]), len(panels[0][1][0])
    size = (len(panels) * (width * _CELL + _GAP) - _GAP, height * _CELL + _TITLE)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif" font-size="13" shape-rendering="crispEdges">',
        f"<title>{html.escape(title)}: what one position sees</title>",
    ]
    for i, (name, rows) in enumerate(panels):
        lines.append(f'<g transform="translate({i * (width * _CELL + _GAP)} 0)">')
        lines.append(f'<text y="14" fill="#808890">{html.escape(name)}</text>')
        for r, row in enumerate(rows):
            for c, share in enumerate(row):
                lines.append(
                    f'<rect x="{c * _CELL}" y="{r * _CELL + _TITLE}" width="{_CELL}" height="{_CELL}" '
                    f'fill="#{bytes(png.colour(share)).hex()}"/>'
                )
        x, y = QUERY[1] * _CELL + 1, QUERY[0] * _CELL + _TITLE + 1
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" fill="none" stroke="#2f9bff" '
            'stroke-width="2"/></g>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main(folder: Path) -> None:
    drawn = {f"{s.slug}.svg": svg for s in catalog.systems(status="works") if (svg := picture(s)) is not None}
    replace_files(folder, ".svg", drawn)
    print(f"{len(drawn)} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
