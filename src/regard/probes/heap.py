"""Freed memory, given back to the system."""

import ctypes
import ctypes.util
import sys


def trim() -> None:
    """Return the free parts of the C heap to the system, where it can be asked to: glibc keeps them otherwise."""
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
        if release is not None:  # glibc has it, musl does not
            release(0)
