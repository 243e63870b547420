"""MoA on SmolLM2: spans found by profiling beside equal windows of the same memory."""

import copy
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.cache import nbytes
from regard.errors import require
from regard.methods.language.moa import (
    ElasticSpace,
    MoA,
    MoAPlan,
    Sample,
    calibrate,
    optimise_plan,
    per_kv_head,
    profile_influence,
    search_plans,
    validate,
)
from regard.sites import apply
from regard.study import models
from regard.study.finding import Claim, Finding, Progress
from regard.tasks import english, negative_log_likelihood, passkey_task, tokenize

_SUMMARY = "\n\nIn short, the text above says that"
_DENSITY = 0.5
_FULL: dict[str, Any] = {
    "lengths": [512, 1024], "unseen": 1536, "block_size": 64, "interval": 256, "summaries": 1, "retrievals": 2,
    "answer": 32, "asked": 4, "validation": 1, "texts": 2, "haystacks": 3, "passkeys": 8,
    "densities": [0.25, 0.375, 0.5, 0.625, 0.75], "gap": 1e-3, "time_limit": 20.0,
}  # fmt: skip
_QUICK: dict[str, Any] = {
    "lengths": [64, 128], "unseen": 192, "block_size": 8, "interval": 32, "summaries": 1, "retrievals": 1,
    "answer": 2, "asked": 1, "validation": 1, "texts": 1, "haystacks": 1, "passkeys": 1,
    "densities": [0.5], "gap": 0.05, "time_limit": 60.0,
}  # fmt: skip


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Calibrate, profile, optimise and validate; then perplexity, passkeys and memory of what was chosen."""
    size = _QUICK if quick else _FULL
    say = on_progress or (lambda *_: None)
    model: Any
    model, tokenizer = models.load("smollm2")
    text = _Text(tokenizer, seed)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    lengths, unseen, block = size["lengths"], size["unseen"], size["block_size"]

    influence: dict[int, Tensor] = {}
    for i, length in enumerate(lengths):
        say(f"calibrate and profile at {length} tokens", i, 7)
        samples = _samples(model, text, length, size, size["summaries"], size["retrievals"], seed + i)
        influence[length] = profile_influence(model, samples, block_size=block)
    say("optimise", 2, 7)
    space = ElasticSpace.default(lengths, [unseen], interval=size["interval"], block_size=block)
    solver = {"gap": size["gap"], "time_limit": size["time_limit"]}
    plans = search_plans(influence, _DENSITY, num_kv_heads=heads, other_lengths=[unseen], space=space, **solver)
    grouped = {n: per_kv_head(x, heads) for n, x in influence.items()}
    curve = _curve(space, grouped, unseen, size["densities"], solver)

    say("validate", 3, 7)
    texts = [_plain(text, unseen) for _ in range(size["validation"])]
    unseen_losses = validate(model, [None, *plans], texts).tolist()
    plan = plans[min(range(len(plans)), key=lambda i: unseen_losses[1 + i])]
    spans = plan.spans(unseen)
    window = math.ceil(spans.double().mean().item() / block) * block  # in favour of the windows that are all alike
    shuffled = torch.randperm(spans.numel(), generator=torch.Generator().manual_seed(seed))
    alphas, betas = (torch.tensor(rows).flatten()[shuffled].view(layers, heads) for rows in (plan.alphas, plan.betas))
    rivals: dict[str, MoAPlan | None] = {
        "dense": None,
        "MoA": plan,
        "equal windows": MoAPlan.uniform(layers, heads, alpha=window, block_size=block),
        "shuffled": MoAPlan(alphas.tolist(), betas.tolist(), block),
    }
    say("perplexity", 4, 7)
    read = [_plain(text, unseen) for _ in range(size["texts"])]
    nats = {name: _nats(model, rival, read) for name, rival in rivals.items()}
    excess = {name: _mean_and_error(torch.cat(found) - torch.cat(nats["dense"])) for name, found in nats.items()}
    say("passkeys", 5, 7)
    tasks = [
        passkey_task(tokenizer, text.prose(2 * unseen), unseen, size["passkeys"], seed + 100 + i)
        for i in range(size["haystacks"])
    ]
    recalls, held = {}, {}
    for name, rival in rivals.items():
        recalls[name], held[name] = _recalls(model, rival, tasks)
    say("done", 7, 7)
    data = {
        "lengths": lengths, "unseen": unseen, "alphas": plan.alphas, "betas": plan.betas, "spans": spans.tolist(),
        "window": window, "curve": curve, "validation": unseen_losses,
        "nats": {name: [x.mean().item() for x in found] for name, found in nats.items()},
        "excess": excess, "recalls": recalls, "bytes": held,
        "depths": [key.depth for key in tasks[0].passkeys], "rules": len(space),
    }  # fmt: skip
    return _finding(data, size)


class _Text:
    """English prose, handed out once: what is profiled is not what is validated or read."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        self.paragraphs = english().split("\n\n")
        random.Random(seed).shuffle(self.paragraphs)

    def prose(self, tokens: int) -> str:
        """Paragraphs not given before, at least so many tokens."""
        taken: list[str] = []
        count = 0
        while count < tokens:
            taken.append(self.paragraphs.pop())
            count += len(tokenize(self.tokenizer, taken[-1])) + 1
        return "\n\n".join(taken)

    def tokens(self, count: int) -> list[int]:
        return tokenize(self.tokenizer, self.prose(count + 1), count)


def _samples(
    model: Any, text: _Text, length: int, size: dict[str, Any], summaries: int, retrievals: int, seed: int
) -> list[Sample]:
    """Texts with the model's own summary, and texts with questions about numbers hidden in them."""
    ask = tokenize(text.tokenizer, _SUMMARY)
    prompts = [text.tokens(length + 1 - size["answer"] - len(ask)) + ask for _ in range(summaries)]
    samples = calibrate(model, prompts, size["answer"])
    for i in range(retrievals):
        found = _retrieval(text, length, size["asked"], seed * 10 + i)
        samples.append(found)
    return samples


def _retrieval(text: _Text, length: int, asked: int, seed: int) -> Sample:
    """A haystack, then its questions with their answers."""
    source = text.prose(length)
    trial = passkey_task(text.tokenizer, source, length, asked, seed)
    tail = sum(len(key.question) + len(key.answer) for key in trial.passkeys)
    task = passkey_task(text.tokenizer, source, length + 1 - tail, asked, seed)
    tokens, answer = list(task.haystack), [False] * len(task.haystack)
    for key in task.passkeys:
        tokens += [*key.question, *key.answer]
        answer += [False] * len(key.question) + [True] * len(key.answer)
    return Sample(torch.tensor(tokens), torch.tensor(answer))


def _plain(text: _Text, length: int) -> Sample:
    """Text as it is; the second half counts."""
    return Sample(torch.tensor(text.tokens(length + 1)), torch.arange(length + 1) > length // 2)


def _curve(
    space: ElasticSpace,
    influence: dict[int, Tensor],
    unseen: int,
    densities: Sequence[float],
    solver: dict[str, Any],
) -> dict[str, list[float]]:
    """Estimated loss at some densities: of the best plan, and of the best rule that is the same for all heads."""
    losses = sum(space.loss(x.flatten(0, 1)) for x in influence.values())
    assert isinstance(losses, Tensor)
    heads = next(iter(influence.values())).shape[1]
    lengths = [*influence, unseen]
    costs = torch.stack([space.cost(n) for n in lengths])
    best, alike = [], []
    for density in densities:
        bounds = [density * n * len(losses) for n in lengths]
        found = optimise_plan(losses[None], costs, bounds, heads_per_layer=heads, lower_ratio=None, **solver)
        best.append(found[0].losses.item())
        fits = (costs <= density * torch.tensor(lengths)[:, None]).all(0)
        alike.append(losses.sum(0)[fits].min().item() if fits.any() else math.nan)
    return {"density": list(densities), "plan": best, "one rule": alike}


@torch.no_grad()
def _nats(model: Any, plan: MoAPlan | None, samples: Sequence[Sample]) -> list[Tensor]:
    """Negative log likelihood of the tokens of each text's second half."""
    found = []
    for sample in samples:
        targets = sample.tokens[sample.answer]
        with apply(model, [] if plan is None else MoA(plan=plan)):
            logits = model(sample.tokens[None, :-1], use_cache=False, logits_to_keep=len(targets)).logits[0]
        found.append(negative_log_likelihood(logits, targets))
    return found


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


@torch.no_grad()
def _recalls(model: Any, plan: MoAPlan | None, tasks: Sequence[Any]) -> tuple[list[list[bool]], int]:
    """Which passkeys are given back, token by token the most likely, and the bytes of the cache after the prompt."""
    found, held = [], 0
    for task in tasks:
        with apply(model, [] if plan is None else MoA(plan=plan)):
            cache = model(torch.tensor([task.haystack]), use_cache=True, logits_to_keep=1).past_key_values
            held = nbytes(cache)
            hits = []
            for key in task.passkeys:
                tokens = torch.tensor([[*key.question, *key.answer]])
                out = model(tokens[:, :-1], past_key_values=copy.deepcopy(cache), logits_to_keep=len(key.answer))
                hits.append(out.logits[0].argmax(-1).tolist() == list(key.answer))
        found.append(hits)
    return found, held


def _finding(data: dict[str, Any], size: dict[str, Any]) -> Finding:
    spans, unseen = torch.tensor(data["spans"]), data["unseen"]
    nats = {name: sum(x) / len(x) for name, x in data["nats"].items()}
    keys = sum(len(hits) for hits in data["recalls"]["dense"])
    hits = {name: sum(map(sum, x)) for name, x in data["recalls"].items()}
    share = {name: x / data["bytes"]["dense"] for name, x in data["bytes"].items()}
    at = data["curve"]["density"].index(_DENSITY)
    plan_loss, rule_loss = data["curve"]["plan"][at], data["curve"]["one rule"][at]
    betas = torch.tensor(data["betas"])
    ppl = {name: math.exp(x) for name, x in nats.items()}
    reach = {name: _reach(data["depths"], x, unseen) for name, x in data["recalls"].items()}
    claims = (
        Claim(
            f"estimated loss at density {_DENSITY}, summed over the profiled lengths",
            "rules of their own lose less than one rule for all heads",
            f"{plan_loss:.3g} against {rule_loss:.3g} (a ratio of {rule_loss / plan_loss:.1f})",
            plan_loss < rule_loss,
        ),
        Claim(
            f"spans at {unseen} tokens, over {spans.numel()} key-value heads",
            "heads differ; some grow with the length, some do not",
            f"{spans.min()} to {spans.max()}, mean {spans.double().mean():.0f}; {(betas > 0).sum()} heads grow, "
            f"{(spans >= unseen).sum()} see everything",
            bool(spans.min() < spans.max()),
        ),
        Claim(
            f"perplexity of unseen text at {unseen} tokens, second half",
            "MoA nearer to dense than equal windows of the same memory",
            "; ".join(
                f"{name} {x:.2f} ({data['excess'][name][0]:+.3f} ± {data['excess'][name][1]:.3f} nats per token)"
                for name, x in ppl.items()
            ),
            _less(data["excess"]["MoA"], data["excess"]["equal windows"]),
        ),
        Claim(
            f"passkeys given back of {keys}, {unseen} tokens",
            "MoA more than equal windows of the same memory (paper: 1.5 to 7.1 times)",
            "; ".join(f"{name} {x}" for name, x in hits.items()),
            hits["MoA"] > hits["equal windows"],
        ),
        Claim(
            "tokens from the end within which no passkey is missed",
            "MoA more than equal windows (paper, larger models: 3.9 times the context at the same mean span)",
            "; ".join(f"{name} {x} tokens" for name, x in reach.items())
            + f"; MoA {reach['MoA'] / spans.double().mean():.1f} of its mean span",
            reach["MoA"] > reach["equal windows"],
        ),
        Claim(
            f"KV cache held after {unseen} tokens",
            f"about {_DENSITY} of dense",
            "; ".join(f"{name} {data['bytes'][name] / 1e6:.1f} MB ({x:.2f})" for name, x in share.items()),
            abs(share["MoA"] - _DENSITY) < 0.1,
        ),
    )
    profiled, front = " and ".join(map(str, data["lengths"])), len(data["validation"]) - 1
    summary = f"""\
SmolLM2-135M-Instruct ({spans.shape[0]} layers of {spans.shape[1]} key-value heads) was profiled at {profiled} tokens of
prose from Python's manual. At each length {size["summaries"]} of the texts ended in the model's own summary, and
{size["retrievals"]} in questions about numbers hidden in them; the loss was taken on the answers. The integer program
chose among {data["rules"]} rules, with at most {_DENSITY} of the text held on average at these lengths and at {unseen},
and two different rules per layer. It found {front} plans on the Pareto front; the one with the least loss
on an unseen text of {unseen} tokens was taken.

It is compared at {unseen} tokens with one window for all heads (first block and recent tokens, {data["window"]} in all,
rounded up in its favour), and with its own rules dealt to the heads at random. Perplexity of {size["texts"]} further
texts: {_listed(ppl, ".2f")}.
Numbers given back, of {keys} hidden in {size["haystacks"]} texts: {_listed(hits, "d")}.
Tokens from the end within which no number was missed: {_listed(reach, "d")}.
The caches held {share["MoA"]:.2f} of the dense one's bytes ({share["equal windows"]:.2f} with equal windows), less than
the density, whose cost counts the sink on top of the span.

The questions about hidden numbers were profiled in the form in which they are asked in the test, in other texts and
with other numbers. The perplexities differ by little more than their errors; the answers are what tells the plans
apart."""
    return Finding(
        "moa-sparse", "MoA: spans of its own for every head of SmolLM2", ("moa-sparse",), summary, claims, size, data
    )


def _reach(depths: Sequence[float], recalls: Sequence[Sequence[bool]], length: int) -> int:
    """Tokens from the end of the text within which every passkey is given back."""
    found = 0
    for depth, hits in reversed(list(zip(depths, zip(*recalls, strict=True), strict=True))):
        if not all(hits):
            break
        found = round((1 - depth) * length)
    return found


def _less(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Whether one (mean, error) is less than another; None where the errors do not tell."""
    if abs(first[0] - second[0]) <= math.hypot(first[1], second[1]):
        return None
    return first[0] < second[0]


def _listed(values: dict[str, Any], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def draw(finding: Finding) -> Any:
    """Spans by layer and head, the estimated loss over the density, and what is recalled by depth."""
    figure = require("matplotlib.figure", "draw the figure").Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    data = finding.data
    image = left.imshow(torch.tensor(data["spans"]).T, aspect="auto", cmap="viridis", vmin=0, interpolation="none")
    left.set(
        xlabel="layer",
        ylabel="key-value head",
        title=f"span at {data['unseen']} tokens",
        yticks=range(len(data["spans"][0])),
    )
    figure.colorbar(image, ax=left, label="keys")
    curve = data["curve"]
    for name, marker in (("one rule", "s"), ("plan", "o")):
        middle.plot(
            curve["density"], curve[name], marker=marker, label={"plan": "MoA", "one rule": "one rule for all"}[name]
        )
    middle.set(xlabel="density", ylabel="estimated loss", title="loss and density", ylim=(0, None))
    middle.legend(frameon=False)
    for name, hits in data["recalls"].items():
        style = "--" if name == "shuffled" else "-"
        right.plot(data["depths"], torch.tensor(hits).double().mean(0), style, marker="o", label=name)
    right.set(xlabel="depth of the passkey", ylabel="share given back", title="passkeys", ylim=(-0.05, 1.05))
    right.legend(frameon=False)
    return figure
