"""Neighborhood attention in tiles against masked dense SDPA and against ``backend="blocks"``, on grids.

    python benchmarks/neighborhood.py [--runs 5] [--threads 1]

Processor time of one thread by default, forward and forward plus backward; the three run in turn and medians are
compared, because other work on the machine comes and goes. Planning is done before and has its own columns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from race import machine
from regard import masks
from regard.attention.grid_plan import Axis, extent, tile_size, tiling
from regard.mechanisms.grid.neighborhood import neighborhood_attention

HEADS, DIM = 4, 32
CASES = (
    # grid, kernel_size, dilation, stride
    ((56, 56), 7, 1, 1),
    ((56, 56), 7, 8, 1),
    ((56, 56), 13, 1, 1),
    ((56, 56), 14, 1, 7),
    ((28, 28), 7, 1, 1),
    ((8, 24, 24), (3, 7, 7), 1, 1),
    ((8, 24, 24), (5, 11, 11), 1, 1),
    ((8, 24, 24), (3, 3, 3), (1, 4, 4), 1),
    ((4096,), 255, 1, 1),
    ((4096,), 63, 8, 1),
)


def times(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.process_time()
            function()
            found[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(each) for name, each in found.items()}


def row(grid: tuple[int, ...], size: object, dilation: object, stride: object, runs: int) -> list[str]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *grid, HEADS, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    mask = masks.neighborhood(grid, size, dilation, stride)
    n = q[0, ..., 0, 0].numel()
    dense = mask.dense(n)
    axes = tuple(Axis(a.length, a.window, a.dilation, a.stride, a.causal) for a in mask.axes)

    def planned(plan: Callable[[], object]) -> float:
        start = time.perf_counter()
        plan()
        return 1e3 * (time.perf_counter() - start)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*flat, dense).transpose(1, 2).reshape(grad.shape)

    def by(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: neighborhood_attention(q, k, v, size, dilation, stride, backend=backend)

    plan_tiles = planned(lambda: tiling(axes, tile_size(axes, HEADS)))
    plan_blocks = planned(lambda: by("blocks")(q, k, v))
    chosen = tile_size(axes, HEADS)
    share = 1.0
    for axis, length in zip(axes, chosen, strict=True):
        cut = extent(axis, length)
        share *= cut.tiles * cut.queries * cut.keys / axis.length**2
    functions = {"dense": masked, "tiles": by("tiles"), "blocks": by("blocks")}
    detached = [t.detach() for t in (q, k, v)]
    forward = times({name: lambda f=f: f(*detached) for name, f in functions.items()}, runs)
    both = times(
        {name: lambda f=f: torch.autograd.grad(f(q, k, v), (q, k, v), grad) for name, f in functions.items()}, runs
    )
    cells = [str(grid), str(size), str(dilation), str(stride), f"{mask.density(n):.3f}", f"{share:.3f}"]
    cells.append("x".join(map(str, chosen)))
    for found in (forward, both):
        cells += [f"{found['tiles']:.1f}", *(f"{found['tiles'] / found[name]:.2f}" for name in ("dense", "blocks"))]
    return [*cells, f"{plan_tiles:.0f}", f"{plan_blocks:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(title=f"{HEADS} heads of {DIM}, float32; ms of processor time of the tiles, and over the others'")
    names = ("grid", "window", "dilation", "stride", "density", "computed", "tile", "forward ms", "/ dense", "/ blocks")
    for column in (*names, "fwd + bwd ms", "/ dense", "/ blocks", "plan ms", "blocks' first call ms"):
        table.add_column(column, justify="right")
    for case in CASES:
        table.add_row(*row(*case, args.runs))
    console = Console(width=180)
    console.print(machine())
    console.print(table)


if __name__ == "__main__":
    main()
