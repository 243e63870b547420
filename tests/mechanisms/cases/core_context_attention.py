"""CCA: lengths beyond the near tokens, so that cores take part."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "group_size": 4, "local_size": 5}

CASES = [
    Case("gqa", {**SMALL, "rope_theta": 100.0}),
    Case("last-position", {**SMALL, "rope_theta": 100.0, "core_position": "last", "bias": True}),
    Case("mean", {**SMALL, "pool": "mean", "num_kv_heads": 4}),
    Case("last-token-small-window", {**SMALL, "pool": "last", "group_size": 3, "local_size": 1}),
    # a maximum over channels changes abruptly, but continuously
    Case("max", {**SMALL, "pool": "max"}),
]
