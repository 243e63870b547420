"""MoA: influence, the space of rules with losses, costs and layouts, the best plan, and cache sizes."""

from collections.abc import Iterable

import torch

from regard.methods.language.moa import ElasticSpace, MoAPlan, attention_influence, best_plan
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, given = golden.kwargs, golden.inputs
    block, heads = kwargs["block_size"], kwargs["heads"]
    attention = [given[name] for name in ("q", "k", "v", "grad_out")]
    yield golden.compare("influence", attention_influence(*attention, block_size=1), ATOL)
    yield golden.compare("influence_block", attention_influence(*attention, block_size=block), ATOL)

    profiled, extended = kwargs["lengths"], kwargs["extend_length"]
    lengths = [*profiled, extended]
    space = ElasticSpace.grid(
        kwargs["alpha"],
        kwargs["beta"],
        min_length=min(lengths),
        max_profile=max(profiled),
        max_length=max(lengths),
        block_size=block,
    )
    yield golden.compare("config_alpha", torch.tensor(space.alphas), ATOL)
    yield golden.compare("config_beta", torch.tensor(space.betas), ATOL)
    losses = {n: space.loss(given[f"importance_{n}"]) for n in profiled}
    for n, loss in losses.items():
        yield golden.compare(f"loss_{n}", loss, ATOL)
    for n in lengths:
        yield golden.compare(f"cost_{n}", space.cost(n).expand(heads, -1), ATOL)
        yield golden.compare(f"layouts_{n}", space.layouts(n), 0)

    bounds = [kwargs["density_bound"] * n * heads for n in lengths]
    best = best_plan(torch.stack(list(losses.values())), torch.stack([space.cost(n) for n in lengths]), bounds)
    yield golden.compare("best_plan", best.rules, 0)
    yield golden.compare("best_losses", best.losses.float(), ATOL)

    plan = MoAPlan(given["cache_alphas"].tolist(), given["cache_betas"].tolist())
    sizes = int(given["cache_seq_len"]), int(given["cache_max_new_token"])
    yield golden.compare("cache/cache_size", plan.spans(*sizes), 0)
    yield golden.compare("cache/static_size", plan.sinks(*sizes), 0)
