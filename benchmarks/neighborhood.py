"""Neighborhood attention in tiles against dense SDPA, ``blocks``, compiled FlexAttention and NATTEN, on grids.

    python benchmarks/neighborhood.py [--runs 5] [--threads 1]

Processor time of one thread by default, forward and forward plus backward, all in turn and medians compared, because
other work on the machine comes and goes. Planning and compiling are done before. FlexAttention has no backward on a
CPU; NATTEN runs where it is installed, on a CPU as FlexAttention too (0.21). "predicted" is
`regard.mechanisms.grid.tile_simulator.predict_ratio` over what was measured: the forward time of the tiles over that of
dense attention without a mask.
"""

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from race import Race, machine
from regard import masks
from regard.attention import attention
from regard.mechanisms.grid.neighborhood import neighborhood_attention
from regard.mechanisms.grid.tile_simulator import predict_ratio

HEADS, DIM = 4, 32
CASES = (
    # grid, kernel_size, dilation, stride
    ((56, 56), 7, 1, 1),
    ((56, 56), 7, 8, 1),
    ((56, 56), 13, 1, 1),
    ((56, 56), 14, 1, 7),
    ((28, 28), 7, 1, 1),
    ((96, 96), 7, 1, 1),
    ((96, 96), 16, 1, 16),
    ((96, 96), 33, 1, 1),
    ((8, 24, 24), (3, 7, 7), 1, 1),
    ((8, 24, 24), (5, 11, 11), 1, 1),
    ((8, 24, 24), (3, 3, 3), (1, 4, 4), 1),
    ((16, 24, 24), (4, 8, 8), 1, (4, 8, 8)),
    ((16, 24, 24), (8, 8, 8), 1, (4, 4, 4)),
    ((8192,), 255, 1, 1),
    ((8192,), 256, 1, 256),
    ((8192,), 63, 8, 1),
)
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def functions(grid: tuple[int, ...], size: object, dilation: object, stride: object) -> dict[str, Function]:
    mask = masks.neighborhood(grid, size, dilation, stride)
    n = torch.Size(grid).numel()
    dense = mask.dense(n)

    def flat(t: Tensor) -> Tensor:
        return t.flatten(1, -3).transpose(1, 2)

    def back(t: Tensor) -> Tensor:
        return t.transpose(1, 2).unflatten(1, grid)

    def by(backend: str) -> Function:
        return lambda q, k, v: neighborhood_attention(q, k, v, size, dilation, stride, backend=backend)

    found: dict[str, Function] = {
        "tiles": by("tiles"),
        "full": lambda q, k, v: back(F.scaled_dot_product_attention(flat(q), flat(k), flat(v))),
        "dense": lambda q, k, v: back(F.scaled_dot_product_attention(flat(q), flat(k), flat(v), dense)),
        "blocks": by("blocks"),
        "flex": lambda q, k, v: back(attention(flat(q), flat(k), flat(v), mask=mask, backend="flex")),
    }
    return found | ({"natten": by("natten")} if find_spec("natten") else {})


def row(grid: tuple[int, ...], size: object, dilation: object, stride: object, race: Race) -> list[str]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *grid, HEADS, DIM, requires_grad=True) for _ in range(3))
    grad, detached = torch.randn_like(q), [t.detach() for t in (q, k, v)]
    contest = functions(grid, size, dilation, stride)
    for function in contest.values():
        function(*detached)
    t = race({name: lambda f=f: f(*detached) for name, f in contest.items()})
    both = race(
        {
            name: lambda f=f: torch.autograd.grad(f(q, k, v), (q, k, v), grad)
            for name, f in contest.items()
            if name in ("tiles", "dense", "blocks")
        }
    )
    n = torch.Size(grid).numel()
    cells = [str(grid), str(size), str(dilation), str(stride)]
    cells.append(f"{masks.neighborhood(grid, size, dilation, stride).density(n):.3f}")
    cells.append(f"{1e3 * t['tiles']:.1f}")
    cells += [f"{t['tiles'] / t[name]:.2f}" if name in t else "-" for name in ("dense", "blocks", "flex", "natten")]
    cells += [f"{1e3 * both['tiles']:.1f}", *(f"{both['tiles'] / both[name]:.2f}" for name in ("dense", "blocks"))]
    predicted = predict_ratio(grid, size, stride, dilation, heads=HEADS)
    return [*cells, f"{predicted:.3f}", f"{predicted * t['full'] / t['tiles']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    race = Race(args.runs, time.process_time)
    table = Table(title=f"{HEADS} heads of {DIM}, float32; ms of processor time of the tiles, and over the others'")
    columns = (
        "grid",
        "window",
        "dilation",
        "stride",
        "density",
        "forward ms",
        "/ dense",
        "/ blocks",
        "/ flex",
        "/ natten",
    )
    for column in (*columns, "fwd + bwd ms", "/ dense", "/ blocks", "predicted / full", "over measured"):
        table.add_column(column, justify="right")
    console = Console(width=180)
    for case in track(CASES, "racing", console=console, transient=True):
        table.add_row(*row(*case, race))
    console.print(machine())
    console.print(table)


if __name__ == "__main__":
    main()
