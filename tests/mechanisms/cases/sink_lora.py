"""SinkLoRA: full attention after training, and its groups where they are kept."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "num_kv_heads": 2}

CASES = [
    Case("eval", {**SMALL, "rope_theta": 100.0}, compiles=True),
    Case("groups", {**SMALL, "group_size": 6, "num_sinks": 2, "always": True, "rope_theta": 50.0, "rope_factor": 4.0}),
    Case("s2", {**SMALL, "group_size": 8, "num_sinks": 0, "return_ratio": 0.0, "always": True, "bias": True}),
]
