"""Compressed convolutional attention with and without grouping, and without its parts."""

from tests.mechanisms.case import Case

CASES = [
    Case("grouped", {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "rope_theta": 100.0}, compiles=True),
    Case("wide-kernels", {"dim": 16, "num_heads": 2, "head_dim": 4, "kernel_sizes": (4, 3), "window_size": 5}),
    Case("bare", {"dim": 16, "num_heads": 2, "kernel_sizes": (1, 1), "qk_mean": False, "value_shift": False}),
]
