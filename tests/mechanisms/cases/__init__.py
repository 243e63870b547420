"""Small configurations of every mechanism, one module per slug (`_` for `-`) with a list `CASES`.

    from tests.mechanisms.case import Case

    CASES = [Case("causal", {"dim": 16, "num_heads": 2}), Case("noncausal", {"dim": 16, "causal": False})]

`tests/mechanisms/test_contract.py` holds each of them to what `Mechanism` promises.
"""
