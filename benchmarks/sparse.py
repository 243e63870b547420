"""Block-sparse attention against dense SDPA and compiled FlexAttention, side by side.

    python benchmarks/sparse.py [--quick] [--no-flex] [--lengths 8192] [--threads 1 --cpu-time]

For every pattern and density: the time of ``backend="blocks"`` over the time of dense attention (forward, and forward
plus backward), next to the goal ``density / 0.7``, and over the time of compiled FlexAttention (forward only: on CPU it
has no backward). Dense and sparse runs alternate and medians are compared, because other work on the machine comes and
goes. Planning and compilation are done before timing; the time to plan has its own column.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from race import Race, machine
from regard import masks
from regard.attention import attention
from regard.attention.blocks import prepare
from regard.attention.problem import checked
from regard.errors import Unsupported
from regard.masks import Mask

DENSITIES = (0.03, 0.06, 0.125, 0.25, 0.5)
GOAL_DENSITY, GOAL_LENGTH, GOAL_SHARE = 0.25, 8192, 0.7
HEADS, DIM = 4, 64


def window(n: int, density: float) -> Mask:
    return masks.sliding_window(round(n * (1 - math.sqrt(1 - density))))


def power(n: int, density: float) -> Mask:
    """PowerAttention in blocks of 64; its window makes up the density that the powers of two leave."""
    return _closest((masks.power(64, blocks) for blocks in _steps(n // 64)), n, density)


def neighborhood(n: int, density: float) -> Mask:
    width = 2 ** math.ceil(math.log2(n) / 2)
    grid = (n // width, width)
    sizes = (tuple(max(3, round(g * share / 40) // 2 * 2 + 1) for g in grid) for share in range(1, 40))
    return _closest((masks.neighborhood(grid, size) for size in dict.fromkeys(sizes)), n, density)


def documents(n: int, density: float) -> Mask:
    """Documents whose lengths vary by a factor of two around their mean."""
    count = max(2, round(1 / density))
    share = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 1
    ends = (share.cumsum(0) / share.sum() * n).round().long()
    return masks.documents(ends.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist())


def random_list(n: int, density: float) -> Mask:
    """A list of blocks of 64 per query block and head, as chosen at run time."""
    return masks.random_blocks(n, block_size=64, density=density, heads=HEADS)


PATTERNS: dict[str, Callable[[int, float], Mask]] = {
    "window": window,
    "power": power,
    "neighborhood-2D": neighborhood,
    "documents": documents,
    "random list": random_list,
}


def _steps(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size = max(size + 1, round(size * 1.15))


def _closest(found: Iterator[Mask], n: int, density: float) -> Mask:
    return min(found, key=lambda mask: abs(math.log(mask.density(n, n) / density)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length, three densities, fewer runs")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it compiles for long)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time, where other work runs beside"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths, densities, runs = args.lengths, DENSITIES, args.runs
    if args.quick:
        lengths, densities, runs = lengths[:1], (0.06, 0.125, 0.25), 3

    console = Console(width=100)
    console.print(
        f"{machine()}; float32, batch 1, {HEADS} heads of {DIM}; "
        f"{'processor' if args.cpu_time else 'wall'} time, median of {runs}"
    )
    race = Race(runs, time.process_time if args.cpu_time else time.perf_counter)
    missed = []
    for n in lengths:
        table = Table(title=f"N = {n}: time over dense time (goal: density / {GOAL_SHARE})", title_justify="left")
        for column in ("pattern", "density", "computed", "goal", "forward", "fwd + bwd", "fwd / flex", "plan ms"):
            table.add_column(column, justify="left" if column == "pattern" else "right")
        for name, make in PATTERNS.items():
            for density in densities:
                with console.status(f"{name}, N = {n}, density {density}"):
                    row, met = measure(make(n, density), n, race, not args.no_flex)
                table.add_row(name, *row)
                if not met:
                    missed.append(f"{name} at N = {n}, density {row[0]}")
        console.print(table)
    if max(lengths) >= GOAL_LENGTH:
        console.print(f"Goal (density <= {GOAL_DENSITY}, N >= {GOAL_LENGTH}) missed: {'; '.join(missed) or 'nowhere'}")


def measure(mask: Mask, n: int, race: Race, with_flex: bool) -> tuple[list[str], bool]:
    """One row of the table, and whether it meets the goal where the goal applies."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, HEADS, n, DIM, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    density = mask.density(n, n)
    start = time.perf_counter()
    work = prepare(checked(q, k, v, mask))[0]
    planning = time.perf_counter() - start

    def forward(**options: object) -> Tensor:
        with torch.no_grad():
            return attention(q, k, v, **options)  # type: ignore[call-overload, no-any-return]

    def both(**options: object) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(q, k, v, **options), leaves, grad)  # type: ignore[call-overload]

    contest: dict[str, Callable[[], object]] = {
        "dense": lambda: forward(backend="sdpa"),
        "blocks": lambda: forward(mask=mask, backend="blocks"),
        "dense both": lambda: both(backend="sdpa"),
        "blocks both": lambda: both(mask=mask, backend="blocks"),
    }
    if with_flex:
        try:
            forward(mask=mask, backend="flex")
            contest["flex"] = lambda: forward(mask=mask, backend="flex")
        except Unsupported:
            pass
    t = race(contest)
    goal = density / GOAL_SHARE
    ratios = t["blocks"] / t["dense"], t["blocks both"] / t["dense both"]
    versus = t["blocks"] / t["flex"] if "flex" in t else None
    applies = density <= GOAL_DENSITY * 1.02 and n >= GOAL_LENGTH
    met = not applies or (max(ratios) <= goal and (versus is None or versus <= 1))
    shown = [f"[{'green' if r <= goal else 'red'}]{r:.3f}" if applies else f"{r:.3f}" for r in ratios]
    return [
        f"{density:.3f}",
        f"{work.density:.3f}",
        f"{goal:.3f}",
        *shown,
        "-" if versus is None else f"{versus:.2f}",
        f"{planning * 1e3:.0f}",
    ], met


if __name__ == "__main__":
    main()
