"""Agent attention: the layers of three backbones, and AgentSD's merging around attention."""

from collections.abc import Iterable

import torch

import regard
from regard.layers.merging import GridMerge
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    for variant in ("deit", "pvt", "swin"):
        layer = regard.from_official(
            "agent-attention", golden.state(f"{variant}."), variant=f"{variant}-attention", **golden.kwargs[variant]
        ).eval()
        x = golden.inputs[f"{variant}_x"].requires_grad_()
        y = layer(x)
        yield golden.compare(variant, y, ATOL)
        if variant == "deit":
            yield golden.compare("grad/in/deit_x", torch.autograd.grad(y.sum(), x)[0], ATOL)

    kwargs = golden.kwargs["sd"]
    layer = regard.from_official("agent-attention", golden.state("sd."), variant="sd", **kwargs)
    x, grid = golden.inputs["sd_x"], (kwargs["h"], kwargs["w"])
    merging = GridMerge.match(x, grid, (kwargs["sy"], kwargs["sx"]))
    merged, agents = merging.merge(x, kwargs["r"]), merging.merge(x, kwargs["agent_r"])
    yield golden.compare("sd_merged", merged, ATOL)
    yield golden.compare("sd_agents", agents, ATOL)
    yield golden.compare("sd_attn", layer.attend(merged, agents), ATOL)
    yield golden.compare("sd_unmerged", layer(x, grid), ATOL)
