"""H2O: the published masking simulation (one layer without rotary embedding), and its true eviction."""

from collections.abc import Iterable

import torch

from regard.cache import HeavyHitterLayer, HeavyHitterMask
from regard.sites import Step
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    yield from _masking(golden)
    yield from _eviction(golden)


def _masking(golden: Golden) -> Iterable[Comparison]:
    kwargs, state, hidden = golden.kwargs, golden.state(), golden.inputs["hidden_states"]
    query, key, value = (
        (hidden @ state[f"{name}_proj.weight"].mT).unflatten(-1, (kwargs["num_heads"], -1)).transpose(1, 2)
        for name in "qkv"
    )
    prefill, total = kwargs["prefill"], hidden.shape[1]
    policy = HeavyHitterMask(kwargs["heavy_ratio"], kwargs["recent_ratio"])
    future = torch.ones(total, total, dtype=torch.bool).triu(1)
    outputs, masks = [], []
    for start, stop in [(0, prefill), *((t, t + 1) for t in range(prefill, total))]:
        logits = query[:, :, start:stop] @ key[:, :, :stop].mT * query.shape[-1] ** -0.5
        logits = logits.masked_fill(future[start:stop, :stop], torch.finfo(logits.dtype).min)
        weights = policy.apply(logits).softmax(-1)
        policy.update(weights)
        outputs.append((weights @ value[:, :, :stop]).transpose(1, 2).flatten(2) @ state["o_proj.weight"].mT)
        masks.append(torch.nn.functional.pad(policy.mask[0, :, 0], (0, total - stop)))
    yield golden.compare("attn_output", torch.cat(outputs, dim=1), atol=1e-5)
    yield golden.compare("keep_masks", torch.stack(masks), atol=0)
    yield golden.compare("budgets", torch.tensor(policy.budgets), atol=0)


def _eviction(golden: Golden) -> Iterable[Comparison]:
    layer = HeavyHitterLayer(golden.kwargs["hh_size"], golden.kwargs["recent_size"])
    maps = [golden.inputs[f"real_attn.{i}"] for i in range(sum(name.startswith("real_attn") for name in golden.inputs))]
    kept = []
    for weights in maps:
        batch, heads, new, _ = weights.shape
        layer.begin(Step(torch.arange(layer.seen, layer.seen + new)[None]))
        layer.update(torch.zeros(batch, heads, new, 1), torch.zeros(batch, heads, new, 1))
        layer.observe(weights.sum(2), new)
        layer.evict()
        kept.append(layer.slots.positions[0].expand(heads, -1).long())
    yield golden.compare("real_kept_positions", torch.stack(kept), atol=0)
    yield golden.compare("real_scores", layer.scores[0], atol=1e-5)
