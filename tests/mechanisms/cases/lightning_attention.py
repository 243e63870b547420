"""Lightning attention with each gate and norm."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 2, "layer_idx": 1, "num_layers": 4}

CASES = [
    Case("tnl", SMALL, compiles=True),
    Case("minimax", {**SMALL, "num_heads": 3, "head_dim": 4, "slopes": "minimax", "gate": "full", "norm": "rms"}),
    Case("transnormer", {**SMALL, "gate": "linear", "norm": "simple", "activate_values": False, "relative": True}),
]
