from tests.mechanisms.case import Case

CASES = [
    Case("linear", {"dim": 12, "depth": 1, "residual_norm": False, "max_lr": 0.1}),
    Case("mlp", {"dim": 12, "chunk_size": 4}, lengths=(1, 2, 3, 4, 7, 16, 33)),
    # the inner gradients follow the weights here: large steps amplify rounding (bf16 23% at 1, 1.8% at 0.05)
    Case("boundaries", {"dim": 12, "chunk_size": 2, "batch_size": 6, "max_lr": 0.05}),
    Case(
        "heads",
        {"dim": 12, "num_heads": 2, "chunk_size": 3, "qk_norm": True, "post_norm": True, "lr_modulation": True},
    ),
    Case("plain", {"dim": 12, "chunk_size": 2, "momentum": False, "decay": False, "pre_norm": False, "max_lr": 0.1}),
    *(
        Case(
            f"{part}-{p}-persistent",
            {"dim": 12, "num_heads": 2, reach: 5, "num_persistent": p, "rope_theta": theta, "memory": memory},
            part=part,
        )
        for part, reach in (
            ("memory-as-context", "segment_len"),
            ("memory-as-gate", "window_size"),
            ("memory-as-layer", "window_size"),
        )
        for p, theta, memory in ((3, 50.0, {"chunk_size": 2, "depth": 1}), (0, None, {"max_lr": 0.1, "chunk_size": 3}))
    ),
]
