"""Block structure for a million tokens: time, memory and size, per mask.

    python benchmarks/masks.py [--tokens 1048576] [--block-size 128] [--threads 1] [name ...]

Every mask is measured in a process of its own. Memory is the highest resident set during the build less the resident
set before it, as the kernel counts both. The time is the median of five builds, each from a newly made mask, so that
nothing is cached; what making the mask itself takes is not counted.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from race import machine
from regard import masks
from regard.masks import Mask

REPEATS = 5


def documents(n: int) -> Mask:
    """Documents of 64 to 8192 tokens, packed without gaps."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := n - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(64, 8192, (), generator=generator))))
    return masks.documents(lengths)


def square(n: int) -> tuple[int, int]:
    """A 2-D grid of ``n`` tokens, as square as powers of two allow."""
    height = 1 << ((n.bit_length() - 1) // 2)
    return height, n // height


def cube(n: int) -> tuple[int, int, int]:
    """A 3-D grid of ``n`` tokens."""
    depth = 1 << ((n.bit_length() - 1) // 3)
    return depth, *square(n // depth)


MASKS: dict[str, Callable[[int], Mask]] = {
    "causal": lambda n: masks.causal(),
    "sliding_window(4096)": lambda n: masks.sliding_window(4096),
    "causal & (window | sinks)": lambda n: masks.causal() & (masks.sliding_window(4096) | masks.sinks(64)),
    "dilated(512, 16)": lambda n: masks.dilated(512, 16),
    "strided(128)": lambda n: masks.strided(128),
    "strided(512)": lambda n: masks.strided(512),
    "causal & (strided | window)": lambda n: masks.causal() & (masks.strided(128) | masks.sliding_window(512)),
    "power()": lambda n: masks.power(),
    "power(256, 5, 1)": lambda n: masks.power(256, 5, 1),
    "documents": documents,
    "causal & documents": lambda n: masks.causal() & documents(n),
    "blockwise_causal(4096)": lambda n: masks.blockwise_causal(4096),
    "neighborhood 1-D 257, dilation 16": lambda n: masks.neighborhood((n,), 257, 16),
    "neighborhood 2-D 17 x 33": lambda n: masks.neighborhood(square(n), (17, 33)),
    "neighborhood 2-D 13 x 13, dilation 8": lambda n: masks.neighborhood(square(n), 13, 8),
    "neighborhood 3-D 8 x 8 x 8": lambda n: masks.neighborhood(cube(n), 8),
    "windows 2-D 16 x 16": lambda n: masks.windows(square(n), 16),
    "shifted_windows 2-D 16 x 16": lambda n: masks.shifted_windows(square(n), 16),
    "halo 2-D 8, 3": lambda n: masks.halo(square(n), 8, 3),
    "8 heads, windows 256 to 32768": lambda n: masks.per_head(
        [masks.sliding_window(1 << e, causal=True) for e in range(8, 16)]
    ),
}


def resident(field: str) -> int:
    """A field of /proc/self/status (``VmRSS``, ``VmHWM``) in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def measure(name: str, n: int, block_size: int, threads: int) -> dict[str, float]:
    """Build one mask's structure; meant to run in a fresh process."""
    torch.set_num_threads(threads)
    MASKS[name](1 << 14).blocks(1 << 14, block_size=block_size)  # load what is loaded lazily
    mask = MASKS[name](n)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    structure = mask.blocks(n, block_size=block_size)
    peak = resident("VmHWM") - before
    seconds = []
    for _ in range(REPEATS):
        mask = MASKS[name](n)
        start = time.perf_counter()
        structure = mask.blocks(n, block_size=block_size)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "peak": peak,
        "runs": structure.num_runs,
        "nbytes": structure.nbytes,
        "density": structure.density,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="masks to measure; all if none")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in MASKS]:
        parser.error(f"unknown masks {unknown}; known are {list(MASKS)}")
    if args.worker:
        print(json.dumps(measure(args.names[0], args.tokens, args.block_size, args.threads)))
        return

    console = Console(width=100)
    console.print(
        f"{machine(args.threads)}\n{args.tokens:,} tokens, blocks of {args.block_size}, median of {REPEATS} builds"
    )
    table = Table()
    table.add_column("mask")
    for header in ("time (s)", "peak extra (MB)", "structure (MB)", "runs", "block density"):
        table.add_column(header, justify="right")
    for name in args.names or MASKS:
        options = ["--worker", "--tokens", args.tokens, "--block-size", args.block_size, "--threads", args.threads]
        command = [sys.executable, __file__, name, *map(str, options)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(
            name,
            f"{result['seconds']:.3f}",
            f"{result['peak'] / 1e6:.1f}",
            f"{result['nbytes'] / 1e6:.2f}",
            f"{result['runs']:,}",
            f"{result['density']:.3%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
