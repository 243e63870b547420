"""The most memory a stretch of code really takes."""

import gc
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from regard.errors import require
from regard.probes.heap import trim

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what to write there to set the peak back to the present size, see proc(5)


class _Gauge(Protocol):
    """Present and highest memory of the process, or of the device."""

    def reset(self) -> None:
        """Forget the peak."""

    def now(self) -> int: ...

    def peak(self) -> int:
        """The most since `reset`."""


class PeakMemory:
    """How many bytes the code in its ``with`` blocks takes at its worst, beyond what was there before the first.

        meter = PeakMemory(torch.device("cpu"))
        with meter:
            reading = read(prompt)
        spare = copy.deepcopy(reading)  # not counted
        with meter:
            decode(reading)
        meter.bytes

    What is measured: on CUDA, the allocator's own account. On a CPU, the resident memory of the whole process, of
    which Linux keeps the exact peak; elsewhere it is sampled every millisecond. Freed memory is given back to the
    system before and after each block, so that what earlier code left behind is neither counted nor reused unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._gauge = _gauge(device)
        self._held = 0

    def __enter__(self) -> Self:
        _release()
        self._gauge.reset()
        self._start = self._gauge.now()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.bytes = max(self.bytes, self._held + self._gauge.peak() - self._start)
        _release()
        self._held += self._gauge.now() - self._start


def _gauge(device: torch.device) -> _Gauge:
    if device.type == "cuda":
        return _Cuda(device)
    return _Linux() if _Linux.works() else _Sampled()


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class _Linux:
    @staticmethod
    def works() -> bool:
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            return "VmHWM" in _STATUS.read_text()
        except OSError:
            return False

    def reset(self) -> None:
        _CLEAR_REFS.write_text(_RESET_PEAK)

    def now(self) -> int:
        return self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM")

    @staticmethod
    def _read(field: str) -> int:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


class _Sampled:
    """A thread that looks at the resident memory all the time between `reset` and `peak`."""

    def __init__(self) -> None:
        self._process = require("psutil", "measure memory on this system").Process()
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        self._highest = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        return self._process.memory_info().rss

    def peak(self) -> int:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        return max(self._highest, self.now())

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._highest = max(self._highest, self.now())


def _release() -> None:
    """Collect garbage and give freed heap memory back to the system, where it can be asked to."""
    gc.collect()
    trim()
