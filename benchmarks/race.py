"""Timing several functions against each other in one process."""

import platform
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


class Race:
    """Times several functions in turn, so that what disturbs one disturbs all.

    Args:
        runs: of each function; the median counts. One more round before them warms up.
        clock: `time.process_time` counts what this process used, for machines that are shared.
    """

    def __init__(self, runs: int, clock: Callable[[], float] = time.perf_counter):
        self.runs, self.clock = runs, clock

    def __call__(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in functions}
        for run in range(self.runs + 1):
            for name, function in functions.items():
                start = self.clock()
                function()
                if run:
                    times[name].append(self.clock() - start)
        return {name: median(each) for name, each in times.items()}


def machine(threads: int | None = None) -> str:
    """Processor, threads and versions, for the line above a table."""
    threads = threads or torch.get_num_threads()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{platform.machine()} {_processor()}, {threads} thread(s), {versions}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
