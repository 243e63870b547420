"""Backbones: time of an image forward and in training, against timm's network of the same name where it has one.

    python benchmarks/vision.py [--backbones davit-tiny maxvit-tiny] [--batch 4] [--runs 3]

By default the smallest published size of every backbone. "/ timm" is regard's time over timm's, with equal weights, in
turn in one process. timm lies where `make install` puts it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.timm_shim import timm

import regard
from race import Race, machine
from regard import catalog
from regard.models.vision.backbone import Backbone

TIMM = {
    "maxvit-tiny": "maxvit_tiny_tf_224",
    "davit-tiny": "davit_tiny",
    "gc-vit-xxtiny": "gcvit_xxtiny",
    "halonet-26t": "halonet26t",
    "shvit-s1": "shvit_s1",
}


def smallest() -> Iterator[str]:
    """The backbones timm has, and the first published size of every other."""
    yield from TIMM
    for system in catalog.systems(status="works"):
        sizes = [name for name in system.models if issubclass(system.load_model(name)[0], Backbone)]
        if sizes and not set(sizes) & set(TIMM):
            yield sizes[0]


def uses(model: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    parameters = list(model.parameters())

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    def both() -> None:
        y = model(images)
        torch.autograd.grad(y.sum(), parameters, allow_unused=True)

    return {"forward": forward, "fwd + bwd": both}


def row(name: str, batch: int, race: Race) -> list[str]:
    ours = regard.create(name).eval()
    images = torch.randn(batch, 3, type(ours).example_size, type(ours).example_size)
    contest = {f"ours {use}": function for use, function in uses(ours, images).items()}
    if name in TIMM:
        theirs = timm.create_model(TIMM[name]).eval()
        contest |= {f"timm {use}": function for use, function in uses(theirs, images).items()}
    t = race(contest)
    millions = sum(p.numel() for p in ours.parameters()) / 1e6
    cells = [name, f"{millions:.1f}"]
    for use in ("forward", "fwd + bwd"):
        seconds = t[f"ours {use}"]
        cells += [f"{1e3 * seconds / batch:.0f}", f"{seconds / t[f'timm {use}']:.2f}" if name in TIMM else "-"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", help="names of published sizes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other work runs beside")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    race = Race(args.runs, time.process_time if args.cpu_time else time.perf_counter)
    console = Console(width=100)
    clock = "processor" if args.cpu_time else "wall"
    console.print(f"{machine()}; float32, batch {args.batch}; {clock} time, median of {args.runs}")
    table = Table("backbone", "M parameters", "forward ms / image", "/ timm", "fwd + bwd ms / image", "/ timm")
    for name in track(args.backbones or list(smallest()), "racing", console=console, transient=True):
        table.add_row(*row(name, args.batch, race))
    console.print(table)


if __name__ == "__main__":
    main()
