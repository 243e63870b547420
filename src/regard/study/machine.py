"""What a measurement ran on."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("regard", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Machine:
    """Hardware and versions.

    Attributes:
        processor: name of the CPU, and of the accelerator if one was used.
        cores: logical CPUs this process may use. threads: those torch uses.
        memory_bytes: of the machine, or None where it cannot be told.
        versions: of Python and the packages that matter.
    """

    system: str
    processor: str
    cores: int
    threads: int
    memory_bytes: int | None
    versions: dict[str, str]

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        """This machine."""
        processor = _cpu_name()
        if device.type == "cuda":
            processor = f"{torch.cuda.get_device_name(device)}, {processor}"
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            processor=processor,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory_bytes=_memory(),
            versions={"python": platform.python_version(), **_versions()},
        )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
