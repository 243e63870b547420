"""Preplan and anchor in SmolLM2's own text, and credit from it on a task that is small enough to train."""

import copy
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.probes import Rhythm, fai, record, record_rhythm, token_entropy
from regard.probes.rhythm import rhythm_of_maps, sampled_layers, top_share
from regard.study.finding import Claim, Finding, Progress
from regard.study.models import load
from regard.tasks.running_sum import Credit, RunningSum, imitate, new_policy, reinforce

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS = (
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. Each loaf costs 3 euros. How much "
    "does the baker earn? Think step by step.",
    "Explain step by step why the sky is blue in the day and red in the evening.",
    "Give a plan, with reasons, for learning to play the piano in one year.",
    "A train leaves at 9 and travels 60 km per hour. Another leaves at 10 and travels 90 km per hour. When does the "
    "second catch up? Think step by step.",
    "Compare keeping a dog and keeping a cat, and then decide which suits a small flat better.",
    "Why did people begin to farm? Give three causes and explain each.",
)
_LEAST = 60  # tokens of a response
_PEAK = 0.2  # share of a response's tokens that count as peaks
_SHUFFLES = 200
_WINDOW = 3  # tokens from a jump to the anchor it introduces
_AFTER = 25  # tokens of a continuation that are compared
_EACH = 4  # tokens of a response that are replaced, of high and of low FAI
_COUPLINGS = (
    ("WAAD peak, high entropy", "tokens that reach back are uncertain ones"),
    ("FAI peak, high entropy", "anchors are uncertain tokens"),
    ("FAI peak, WAAD peak up to 3 tokens before", "a preplan token introduces the anchor"),
    ("FAI peak, jump of WAAD up to 3 tokens before", "a preplan token introduces the anchor"),
    ("FAI peak up to 40 tokens on, and 41 to 100", "anchors stay anchors"),
)


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Read responses, replace tokens of high and low influence, and train with three kinds of credit."""
    prompts, new = (PROMPTS[:1], _LEAST) if quick else (PROMPTS, 120)
    seeds, steps, imitation = (1, 2, 10) if quick else (3, 30, 350)
    kinds = ("plain", "coupled", "random")
    total = 2 * len(prompts) + 1 + seeds * (1 + len(kinds))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(what, done, total)

    generator = torch.Generator().manual_seed(seed)
    model, tokenizer = load("smollm2")
    responses = []
    for tokens, start in _answers(model, tokenizer, prompts, new):
        responses.append(_Response(model, tokenizer, tokens, start))
        step("reading")
    pairs = [response.couplings() for response in responses]
    lifts = [_lift([each[i] for each in pairs], generator) for i in range(len(_COUPLINGS))]
    step("coupling")
    overlaps = []
    for response in responses:
        overlaps.append(response.perturbed())
        step("replacing")
    curves: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for each in range(seeds):
        task = RunningSum()
        policy = new_policy(task, seed + each)
        imitate(policy, task, imitation, seed + each)
        step("imitation")
        for kind in kinds:
            learner = copy.deepcopy(policy)
            curves[kind].append(reinforce(learner, task, _credit(kind, seed + each), steps, seed + each))
            step(f"{kind} credit")
    return _finding(responses, lifts, overlaps, curves, new)


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str], new: int) -> list[tuple[Tensor, int]]:
    """What a model says to each prompt, greedily: (1, N) tokens of both, and where its own begin."""
    asked = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        asked.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    said = _continued(model, asked, least=_LEAST, most=new)
    ends = [
        tokens.tolist().index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else new for tokens in said
    ]
    return [(torch.cat([a, s[:end]])[None], len(a)) for a, s, end in zip(asked, said, ends, strict=True)]


@torch.no_grad()
def _continued(model: Any, texts: Sequence[Tensor], least: int, most: int) -> Tensor:
    """(B, new) what follows texts of any lengths, greedily."""
    length = max(map(len, texts))
    ids = torch.stack([F.pad(text, (length - len(text), 0)) for text in texts])
    there = torch.stack([torch.arange(length) >= length - len(text) for text in texts]).long()
    told = {"attention_mask": there, "min_new_tokens": least, "max_new_tokens": most, "do_sample": False}
    return model.generate(ids, **told)[:, length:]


class _Response:
    """A response, and what is read of it."""

    @torch.no_grad()
    def __init__(self, model: Any, tokenizer: Any, tokens: Tensor, start: int) -> None:
        self.model, self.tokens, self.start = model, tokens, start
        n = self.tokens.shape[1]
        self.mask = torch.arange(n) >= self.start
        layers = sampled_layers(model.config.num_hidden_layers)
        found = record(model, self.tokens, layers=layers, queries=range(n))
        maps = torch.stack([found.layers[i].rows[0] for i in layers])
        self.rhythm: Rhythm = rhythm_of_maps(maps, self.mask, layers=layers)
        self.distant = maps[self.rhythm.global_heads].mean(0)
        self.logits = model(self.tokens).logits[0, self.start - 1 : -1]  # what each token was chosen from
        self.words = [tokenizer.decode([token]) for token in self.tokens[0, self.start :].tolist()]

    def couplings(self) -> list[tuple[Tensor, Tensor, int]]:
        """For each of `_COUPLINGS`: peaks, those they should fall together with, and how far before these may be."""
        far = fai(self.distant, self.mask, 41, 100)
        known = len(far) - 41  # tokens with a far future
        uncertain, reach = top_share(token_entropy(self.logits), _PEAK), top_share(self.rhythm.waad, _PEAK)
        anchors, jumps = top_share(self.rhythm.fai, _PEAK), top_share(self.rhythm.variation, _PEAK)
        near = fai(self.distant, self.mask, 10, 40)
        return [
            (reach, uncertain, 0),
            (anchors, uncertain, 0),
            (anchors, reach, _WINDOW),
            (anchors, jumps, _WINDOW),
            (top_share(near[:known], _PEAK), top_share(far[:known], _PEAK), 0),
        ]

    def perturbed(self) -> dict[str, list[float]]:
        """Jaccard overlap of continuations after the runner-up took the place of tokens of high and low FAI."""
        last = len(self.words) - _AFTER - 1
        order = self.rhythm.fai[:last].sort(descending=True, stable=True).indices.tolist()
        places = order[:_EACH] + order[-_EACH:]
        changed = []
        for place in places:
            text = self.tokens[0, : self.start + place + 1].clone()
            text[-1] = self.logits[place].topk(2).indices[1]
            changed.append(text)
        overlaps = []
        for place, after in zip(places, _continued(self.model, changed, _AFTER, _AFTER).tolist(), strict=True):
            before = self.tokens[0, self.start + place + 1 :][:_AFTER].tolist()
            overlaps.append(len({*before} & {*after}) / len({*before} | {*after}))
        return {"high": overlaps[:_EACH], "low": overlaps[_EACH:]}


def _lift(pairs: Sequence[tuple[Tensor, Tensor, int]], generator: torch.Generator) -> list[float]:
    """For each response (observed - shuffled) / shuffled share of peaks with one of the others in reach."""
    lifts = []
    for peaks, others, back in pairs:
        observed = _together(peaks, others, back)
        shuffled = fmean(
            _together(peaks, others[torch.randperm(len(others), generator=generator)], back) for _ in range(_SHUFFLES)
        )
        lifts.append((observed - shuffled) / shuffled)
    return lifts


def _together(peaks: Tensor, others: Tensor, back: int) -> float:
    """Share of the peaks with one of the others at their own place or up to `back` before."""
    near = torch.stack([others.roll(i).index_fill(0, torch.arange(i), False) for i in range(back + 1)]).any(0)
    return float((peaks & near).sum() / peaks.sum())


def _credit(kind: str, seed: int) -> Credit | None:
    """γ of every response of a batch; random credit is the coupled one with its tokens shuffled."""
    if kind == "plain":
        return None
    generator = torch.Generator().manual_seed(seed)

    def credit(policy: nn.Module, tokens: Tensor, start: int) -> Tensor:
        mask = torch.arange(tokens.shape[1]) >= start
        found = record_rhythm(policy, tokens, mask, layers=(0, 1), window_size=5, h_lo=2, h_hi=12)
        gamma = torch.stack([each.credit("coupled") for each in found])
        if kind == "random":
            gamma = gamma.gather(1, torch.rand(gamma.shape, generator=generator).argsort(1))
        return gamma

    return credit


def _finding(
    responses: Sequence[_Response],
    lifts: list[list[float]],
    overlaps: list[dict[str, list[float]]],
    curves: dict[str, list[list[float]]],
    new: int,
) -> Finding:
    claims = []
    for (name, words), values in zip(_COUPLINGS, lifts, strict=True):
        above = sum(value > 0 for value in values)
        claims.append(
            Claim(
                f"{name}: lift over shuffled peaks",
                f"above 0: {words}",
                f"{fmean(values):+.0%} (above 0 in {above} of {len(values)} responses)",
                fmean(values) > 0 and above > len(values) / 2,
            )
        )
    high, low = ([value for each in overlaps for value in each[name]] for name in ("high", "low"))
    lower = sum(fmean(each["high"]) < fmean(each["low"]) for each in overlaps)
    claims.append(
        Claim(
            "Jaccard overlap of continuations after replacing tokens of high and of low FAI",
            "0.534 and 0.631: high FAI changes more (Qwen3)",
            f"{fmean(high):.3f} and {fmean(low):.3f} over {len(high)} tokens each; high is lower in {lower} of "
            f"{len(overlaps)} responses",
            fmean(high) < fmean(low),
        )
    )
    goal = _goal(curves)
    reached = {kind: [_steps(curve, goal) for curve in each] for kind, each in curves.items()}
    final = {kind: [fmean(curve[-5:]) for curve in each] for kind, each in curves.items()}
    steps = {kind: fmean(values) for kind, values in reached.items()}
    claims += [
        Claim(
            f"steps to a mean reward of {goal:.2f}, running sums of six digits",
            "coupled credit needs no more than plain GRPO, random credit of equal size more",
            "; ".join(f"{kind} {steps[kind]:.0f} ({', '.join(map(str, reached[kind]))})" for kind in curves),
            steps["coupled"] <= steps["plain"] and steps["coupled"] < steps["random"],
        ),
        Claim(
            "mean reward of the last five steps",
            "higher with coupled credit",
            "; ".join(f"{kind} {fmean(final[kind]):.2f}" for kind in curves),
            fmean(final["coupled"]) > max(fmean(final["plain"]), fmean(final["random"])),
        ),
    ]
    shown = responses[0]
    return Finding(
        name="preplan-anchor",
        title="Preplan and anchor tokens in SmolLM2's text, and their credit on running sums",
        systems=("preplan-anchor",),
        summary=f"""
SmolLM2-135M-Instruct answers {len(responses)} questions greedily in up to {new} tokens. WAAD and FAI are read from
five layers of its middle third. A peak is one of the {_PEAK:.0%} largest values of a response; its lift is the share
of peaks that fall together with another kind's, against the same with the other kind's places shuffled {_SHUFFLES}
times (the paper reports three couplings, of +42%, +52% and +171%, on larger models). Then the {_EACH} tokens of
highest and the {_EACH} of lowest FAI are replaced by the model's runner-up, the text is continued, and the sets of the
next {_AFTER} tokens are compared.

The training is a policy of two layers that adds up six digits, after imitating traces with wrong sums, with GRPO on
the last digit alone: plain, with coupled credit from its own attention (FAI 2 to 12 tokens on), and with the same
credit shuffled among a response's tokens. The mean credit is above 1, so the shuffled one is the fair comparison.
A run that does not get there counts as one step more than it had.
""",
        claims=tuple(claims),
        settings={"responses": len(responses), "tokens": new, "seeds": len(curves["plain"])},
        data={
            "words": shown.words,
            "waad": _rounded(shown.rhythm.waad),
            "fai": _rounded(shown.rhythm.fai),
            "lifts": {name: values for (name, _), values in zip(_COUPLINGS, lifts, strict=True)},
            "overlaps": overlaps,
            "rewards": curves,
        },
    )


def _goal(curves: dict[str, list[list[float]]]) -> float:
    """Half way from where plain GRPO begins to where it ends."""
    return fmean((fmean(curve[:3]) + fmean(curve[-5:])) / 2 for curve in curves["plain"])


def _steps(curve: Sequence[float], goal: float) -> int:
    """The first step at which the mean of five reaches the goal."""
    means = [fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
    return next((i + 1 for i, mean in enumerate(means) if mean >= goal and i >= 2), len(curve) + 1)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def draw(finding: Finding) -> "Figure":
    """WAAD and FAI over the tokens of the first response, and rewards while training."""
    from matplotlib.figure import Figure

    data = finding.data
    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    shown = range(min(90, len(data["words"])))
    upper = figure.add_subplot(grid[0, :])
    upper.plot(shown, [data["waad"][i] for i in shown], color="C0")
    upper.set_ylabel("WAAD", color="C0")
    upper.set_xticks(shown, [repr(data["words"][i])[1:-1].replace("$", r"\$") for i in shown], rotation=90, fontsize=6)
    upper.margins(x=0.005)
    right = upper.twinx()
    right.plot(shown, [data["fai"][i] for i in shown], color="C3")
    right.set_ylabel("FAI", color="C3")
    left = figure.add_subplot(grid[1, 0])
    for i, values in enumerate(data["lifts"].values()):
        left.plot([100 * value for value in values], [i] * len(values), "o", color="C0", alpha=0.5)
        left.plot([100 * fmean(values)], [i], "|", color="black", markersize=16)
    left.axvline(0, color="grey", linestyle=":")
    left.set_yticks(range(len(data["lifts"])), list(data["lifts"]), fontsize=6)
    left.invert_yaxis()
    left.set(xlabel="lift over shuffled peaks, %", title="coupling")
    middle = figure.add_subplot(grid[1, 1])
    for i, name in enumerate(("high", "low")):
        values = [value for each in data["overlaps"] for value in each[name]]
        middle.plot([i] * len(values), values, "o", alpha=0.4, color="C0")
        middle.plot([i], [fmean(values)], "_", color="black", markersize=30)
    middle.set_xticks([0, 1], ["high FAI", "low FAI"])
    middle.set(xlim=(-0.5, 1.5), ylabel="Jaccard overlap", title="after replacing a token")
    last = figure.add_subplot(grid[1, 2])
    for i, (kind, curves) in enumerate(data["rewards"].items()):
        values = torch.tensor(curves)
        last.plot(range(1, values.shape[1] + 1), values.mean(0), label=f"{kind} credit", color=f"C{i}")
        last.fill_between(
            range(1, values.shape[1] + 1), values.amin(0), values.amax(0), color=f"C{i}", alpha=0.12, linewidth=0
        )
    last.set(xlabel="step", ylabel="mean reward", title="running sums")
    last.legend()
    return figure
