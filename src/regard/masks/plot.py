"""Pictures of masks."""

from __future__ import annotations

from typing import Any

from regard.errors import ArgumentError, require
from regard.masks.base import Mask

_CELLS = 256  # at most so many rows and columns are drawn
_COLORS = ("#f4f4f2", "#8fb4d9", "#1f4e79")  # none, some, all


def plot(mask: Mask, n: int, m: int, batch: int, head: int) -> Any:
    """See `Mask.plot`."""
    for name, index, size in (("batch", batch, mask.batch or 1), ("head", head, mask.heads or 1)):
        if not 0 <= index < size:
            raise ArgumentError(f"{name} must be 0 to {size - 1} for {mask!r}, got {index}")
    graph_objects = require("plotly.graph_objects", "plot a mask")
    block = max(1, -(-max(n, m) // _CELLS))
    kinds = mask.blocks(n, m, block, exact=block == 1).grid()[batch, head]
    steps = [(edge / 3, color) for kind, color in enumerate(_COLORS) for edge in (kind, kind + 1)]
    heatmap = graph_objects.Heatmap(
        z=kinds.numpy(),
        x0=0,
        dx=block,
        y0=0,
        dy=block,
        zmin=-0.5,
        zmax=2.5,
        colorscale=steps,
        colorbar={"tickvals": [0, 1, 2], "ticktext": ["none", "some", "all"]},
        hovertemplate="query %{y}, key %{x}<extra></extra>",
    )
    axis = {"constrain": "domain"}
    return graph_objects.Figure(
        heatmap,
        layout={
            "title": {"text": repr(mask)},
            "xaxis": {"title": {"text": "key"}, "side": "top", **axis},
            "yaxis": {"title": {"text": "query"}, "autorange": "reversed", "scaleanchor": "x", **axis},
        },
    )
