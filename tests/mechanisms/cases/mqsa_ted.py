"""Queries of short and long windows."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 2}

CASES = [
    Case("short", {**SMALL, "window_size": 1}, compiles=True),
    Case("long", {**SMALL, "window_size": 3}, compiles=True),
    Case("longer-than-the-text", {**SMALL, "window_size": 40, "residual": False, "rope_theta": 100.0}),
]
