"""The way to a plan, stage by stage: calibrate, profile, optimise, validate.

samples = {n: calibrate(model, prompts[n], new_tokens) for n in lengths}
influence = {n: profile_influence(model, samples[n]) for n in lengths}
plans = search_plans(influence, density=0.5, num_kv_heads=3, other_lengths=[1536])
best = plans[validate(model, plans, unseen).argmin()]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.methods.language.moa.influence import attention_influence
from regard.methods.language.moa.method import MoA
from regard.methods.language.moa.plan import MoAPlan
from regard.methods.language.moa.solve import optimise_plan
from regard.methods.language.moa.space import ElasticSpace
from regard.sites import Call, Method, apply

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """A text of the model's own: N + 1 tokens, of which the first N are read and the loss is taken on the answer.

    Attributes:
        tokens: (N + 1,) ids.
        answer: (N + 1,) bool, which of them the model answered.
    """

    tokens: Tensor
    answer: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.answer.shape != self.tokens.shape or self.answer.dtype != torch.bool:
            raise ShapeError(
                f"a sample needs tokens (N + 1,) and answer of the same shape in bool, got "
                f"{tuple(self.tokens.shape)} and {tuple(self.answer.shape)} in {self.answer.dtype}"
            )
        if not self.answer[1:].any():
            raise ArgumentError("a sample without a token of the answer has no loss")

    @property
    def length(self) -> int:
        """N."""
        return len(self.tokens) - 1


def calibrate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    on_progress: OnProgress | None = None,
    **generation: Any,
) -> list[Sample]:
    """Let the model answer each prompt with ``new_tokens`` tokens, so that the loss is about what it would say.

    Args:
        prompts: token ids.
        new_tokens: of each answer; a sample has N = prompt + new_tokens - 1.
        on_progress: called with the number of prompts answered and of all.
        **generation: passed to ``model.generate``; greedy by default.
    """
    if new_tokens < 1:
        raise ArgumentError(f"new_tokens must be at least 1, got {new_tokens}")
    samples = []
    device = next(model.parameters()).device
    for number, prompt in enumerate(prompts, 1):
        ids = torch.tensor([list(prompt)], device=device)
        tokens = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **({"do_sample": False} | generation),
        )[0]
        samples.append(Sample(tokens, torch.arange(len(tokens), device=device) >= len(prompt)))
        if on_progress is not None:
            on_progress(number, len(prompts))
    return samples


def profile_influence(
    model: nn.Module, samples: Sequence[Sample], *, block_size: int = 64, on_progress: OnProgress | None = None
) -> Tensor:
    """Mean over samples of each block's influence on the loss of the answers: (layers, H, N / b, N / b), query heads.

    One forward and backward per sample; the weights of attention are recomputed layer by layer.

    Args:
        samples: of equal length N, a multiple of ``block_size``.
        on_progress: called with the number of samples done and of all.

    Raises:
        ArgumentError: no samples, or of different lengths.
        Unsupported: a layer whose attention is more than causal.
    """
    lengths = {sample.length for sample in samples}
    if len(lengths) != 1:
        raise ArgumentError(f"samples must have one length, got {sorted(lengths)}")
    if next(iter(lengths)) % block_size:
        raise ArgumentError(f"samples must be a multiple of block_size={block_size} long, got {lengths.pop()}")
    probe = _KeepCalls()
    total: Tensor | None = None
    for number, sample in enumerate(samples, 1):
        with torch.enable_grad(), apply(model, probe):
            loss = _answer_loss(model, sample, needs_grad=True)
            # asked for by name, so that the weights get no gradients
            grads = torch.autograd.grad(loss, probe.outs, materialize_grads=True)
        found = [_influence(call, grad, block_size) for call, grad in zip(probe.calls, grads, strict=True)]
        total = torch.stack(found) if total is None else total + torch.stack(found)
        if on_progress is not None:
            on_progress(number, len(samples))
    assert total is not None
    return total / len(samples)


def search_plans(
    influence: Mapping[int, Tensor],
    density: float,
    *,
    num_kv_heads: int | None = None,
    other_lengths: Sequence[int] = (),
    space: ElasticSpace | None = None,
    interval: int = 1024,
    block_size: int = 64,
    **options: Any,
) -> list[MoAPlan]:
    """The Pareto-optimal plans whose heads hold at most ``density`` of the text on average, at every length.

    Args:
        influence: by length, (layers, H, N / b, N / b) as `profile_influence` gives it.
        density: most that may be held, as a share.
        num_kv_heads: key-value heads, which take the largest influence of the query heads that share them; by default
            as many as query heads.
        other_lengths: further lengths at which the density must be kept.
        space: rules to choose from; by default `ElasticSpace.default` with ``interval``.
        **options: of `optimise_plan`.
    """
    if not influence:
        raise ArgumentError("influence must hold at least one length, got none")
    if not 0 < density <= 1:
        raise ArgumentError(f"density must be above 0 and at most 1, got {density}")
    if space is None:
        space = ElasticSpace.default(list(influence), other_lengths, interval=interval, block_size=block_size)
    grouped = {length: per_kv_head(found, num_kv_heads) for length, found in influence.items()}
    layers, heads = next(iter(grouped.values())).shape[:2]
    lengths = list(dict.fromkeys((*influence, *other_lengths)))
    solutions = optimise_plan(
        torch.stack([space.loss(found.flatten(0, 1)) for found in grouped.values()]),
        torch.stack([space.cost(length) for length in lengths]),
        [density * length * layers * heads for length in lengths],
        **{"heads_per_layer": heads} | options,
    )
    alphas, betas = torch.tensor(space.alphas), torch.tensor(space.betas)
    rules = [solution.rules.view(layers, heads) for solution in solutions]
    return [MoAPlan(alphas[rule].tolist(), betas[rule].tolist(), space.block_size) for rule in rules]


def per_kv_head(influence: Tensor, num_kv_heads: int | None) -> Tensor:
    """(layers, Hk, ...) of (layers, H, ...): the largest among the query heads that share a key-value head."""
    heads = influence.shape[1]
    if num_kv_heads is None:
        return influence
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ArgumentError(f"num_kv_heads must divide the {heads} query heads, got {num_kv_heads}")
    return influence.unflatten(1, (num_kv_heads, -1)).amax(2)


@torch.no_grad()
def validate(
    model: nn.Module, plans: Sequence[MoAPlan | None], samples: Sequence[Sample], on_progress: OnProgress | None = None
) -> Tensor:
    """(plans,) mean loss of the answers, in nats per token, under each plan; None stands for the untouched model."""
    if not plans or not samples:
        raise ArgumentError(f"plans and samples must not be empty, got {len(plans)} and {len(samples)}")
    losses = torch.zeros(len(plans), len(samples))
    for i, plan in enumerate(plans):
        for j, sample in enumerate(samples):
            with apply(model, [] if plan is None else MoA(plan=plan)):
                losses[i, j] = _answer_loss(model, sample, needs_grad=False).item()
            if on_progress is not None:
                on_progress(i * len(samples) + j + 1, losses.numel())
    return losses.mean(1)


@dataclass(kw_only=True)
class _KeepCalls(Method):
    """Keep every attention call, with the output that the loss is differentiated by."""

    name: ClassVar[str] = "moa-profile"
    calls: list[Call] = field(default_factory=list, compare=False)
    outs: list[Tensor] = field(default_factory=list, compare=False)

    def prepare(self, model: nn.Module, sites: list[Any]) -> None:
        self.calls.clear()
        self.outs.clear()

    def after(self, call: Call) -> None:
        if call.bias is not None or call.mask != masks.causal():
            raise Unsupported(f"profiling {call.site.name}, whose mask is {call.mask!r}, not plainly causal")
        assert call.out is not None
        self.calls.append(call)
        self.outs.append(call.out)


@torch.no_grad()
def _influence(call: Call, grad: Tensor, block_size: int) -> Tensor:
    """Of one layer, summed over the batch: (H, N / b, N / b)."""
    found = attention_influence(call.query, call.key, call.value, grad, block_size=block_size, scale=call.scale)
    return found.sum(0)


def _answer_loss(model: nn.Module, sample: Sample, *, needs_grad: bool) -> Tensor:
    """Mean cross-entropy of the answer's tokens; a graph exists even if the weights are frozen."""
    device = next(model.parameters()).device
    tokens, answer = sample.tokens.to(device), sample.answer.to(device)
    embedded = model.get_input_embeddings()(tokens[None, :-1]).detach().requires_grad_(needs_grad)  # type: ignore[operator]
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
    return F.cross_entropy(logits[answer[1:]].float(), tokens[1:][answer[1:]])
