"""Agent attention on sequences, and on grids (whose length is fixed, and which have no padding)."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 2}

CASES = [
    Case("sequence", {**SMALL, "num_agents": 5}),
    Case("no-convolution", {**SMALL, "num_agents": 40, "kernel_size": 0}),
    Case("grid", {**SMALL, "num_agents": 4, "grid": (4, 5)}, lengths=(20,), pads=False, compiles=True),
    Case(
        "class-token",
        {**SMALL, "num_agents": 9, "grid": (4, 4), "class_token": True, "kv_reduction": 2, "bias": False},
        lengths=(17,),
        pads=False,
    ),
]
