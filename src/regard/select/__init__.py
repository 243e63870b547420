"""Which key blocks a query block sees, chosen at run time from summaries of the queries and keys.

    mask = select.choose(q, k, top_k=8, block_size=64, sinks=1, local=2)
    out = regard.attention(q, k, v, mask=mask & masks.causal())

`choose` composes the pieces, which also stand alone: `pool` and `pool_segments` summarise tokens, `block_scores`
compares the summaries, `top_k`, `top_p` and `threshold` turn scores into a table of chosen blocks.
"""

from regard.select.choice import choose
from regard.select.rules import threshold, top_k, top_p
from regard.select.summary import block_scores, pool, pool_segments

__all__ = ["block_scores", "choose", "pool", "pool_segments", "threshold", "top_k", "top_p"]
