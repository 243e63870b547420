"""What attention between rule and scene is good for: look-ups, crossed pairs, distractors (arXiv:2401.15030)."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import require
from regard.models.multimodal.gcog import DoubleStream, RuleQueriesStimulus
from regard.study.finding import Claim, Finding, Progress
from regard.tasks.gcog import GCog, GCogBatch, collate
from regard.tasks.gcog_program import OPERATORS, PARITY
from regard.tasks.gcog_splits import generalisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODELS = {"cross": RuleQueriesStimulus, "double": DoubleStream}
_NAMES = {"cross": "rule attends to scene", "double": "no attention between"}
_COLOURS = {"cross": "#1f77b4", "double": "#d62728"}
_GROUPS = {
    "all": OPERATORS,
    "look-ups": ("exist", "getcolor", "getshape"),
    "place": ("go",),
    "parity": PARITY,
}
_DISTRACTORS = (5, 10, 20, 30, 40)
_WIDTH, _HEADS, _BATCH, _RATE, _FEATURES = 64, 4, 128, 2e-3, 5

_SUMMARY = """
Two small readers of gCOG's programs of depth 1, {parameters} parameters at most: `RuleQueriesStimulus`, in which the
rule's tokens attend to the scene's, and `DoubleStream`, in which each is read by itself and the two last tokens are
added. Both get {steps} steps of {batch} out of {trials:,} trials with up to 5 distractors, 5 colours and 5 shapes; four
operators go with the first half of the colours and four with the second half of the shapes. Tests are fresh trials:
with pairs as trained, with the crossed pairs, none of which was trained, and with more distractors than in training.
Empty cells are left out of the scenes (`skip_empty`), which makes a step several times cheaper and hides nothing.

The table gives means ± standard deviations over {seeds} seeds of weights and data. Look-ups are exist, getcolor and
getshape; `go` asks for one of 100 places, and parity operators for a bit of the coordinates, which has to be learnt
place by place. The training here is a few minutes of one core; the paper's is far longer, and what a model has not
learnt yet says nothing about what it could learn.
"""


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Train both with each seed, and test; see the page for how long."""
    seeds, steps, trials, tested = (2, 12, 300, 100) if quick else (3, 1500, 20000, 1500)
    report = on_progress or (lambda what, done, total: None)
    total = seeds * len(_MODELS) * steps
    found = []
    for s in range(seeds):
        start = s * len(_MODELS) * steps
        report("trials", start, total)

        def on_step(done: int, start: int = start) -> None:
            report("training", start + done, total)

        found.append(of_seed(seed + s, steps, trials, tested, on_step))
    report("done", total, total)
    return finding_of(found, steps, trials, _balance(1000 if quick else 8000, seed))


def _later(on_step: Callable[[int], None], start: int, done: int) -> None:
    on_step(start + done)


def of_seed(seed: int, steps: int, trials: int, tested: int, on_step: Callable[[int], None]) -> dict[str, Any]:
    """Both models, trained and tested with one seed; each is independent of the others."""
    train, tests = generalisation("operators", _FEATURES, seed)
    pool = train[0].batch(0, trials)
    held = {name: task.batch(0, tested) for name, task in tests.items()}
    crowd = [_with_distractors(tests["trained pairs"], n).batch(0, tested // 3) for n in _DISTRACTORS]
    found: dict[str, Any] = {}
    for i, (name, cls) in enumerate(_MODELS.items()):
        torch.manual_seed(seed)
        model = cls(_WIDTH, _HEADS, _WIDTH, max_rule_length=2, skip_empty=True)
        curve = _train(model, pool, held, steps, partial(_later, on_step, i * steps))
        one: dict[str, Any] = {"curve": curve, "train": _accuracy(model, _part(pool, tested))}
        one["parameters"] = sum(p.numel() for p in model.parameters())
        for split, batch in held.items():
            one[split] = {group: _accuracy(model, batch, operators) for group, operators in _GROUPS.items()}
        one["distractors"] = {
            group: [_accuracy(model, batch, operators) for batch in crowd] for group, operators in _GROUPS.items()
        }
        found[name] = one
    return found


def finding_of(found: list[dict[str, Any]], steps: int, trials: int, balance: dict[str, float]) -> Finding:
    """What `of_seed` gave with each seed, as a finding."""
    runs = {name: [one[name] for one in found] for name in _MODELS}
    data = {"runs": runs, "distractors": _DISTRACTORS, "balance": balance}
    size = max(one["parameters"] for ones in runs.values() for one in ones)
    words = {"parameters": f"{size:,}", "steps": steps, "batch": _BATCH, "trials": trials, "seeds": len(found)}
    return Finding(
        name="gcog",
        title="What attention between a rule and a scene is good for",
        systems=("gcog",),
        summary=_SUMMARY.format(**words),
        claims=tuple(_claims(data)),
        settings={
            "seeds": len(found),
            "steps": steps,
            "width": _WIDTH,
            "heads": _HEADS,
            "batch": _BATCH,
            "rate": _RATE,
        },
        data=data,
    )


def _with_distractors(task: GCog, n: int) -> GCog:
    return GCog(task.depth, n, task.split, task.subset, task.n_features, task.seed)


def _train(
    model: nn.Module, pool: GCogBatch, held: dict[str, GCogBatch], steps: int, on_step: Callable[[int], None]
) -> dict[str, list[float]]:
    """AdamW with one cycle, gradients clipped at 1; accuracies of the tests ten times on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    curve: dict[str, list[float]] = {"step": [], **{name: [] for name in held}}
    every = max(1, steps // 10)
    for step in range(steps):
        index = torch.randint(len(pool.target), (_BATCH,))
        loss = F.nll_loss(model(pool.rule[index], pool.stim[index]), pool.target[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            on_step(step)
        if (step + 1) % every == 0:
            curve["step"].append(step + 1)
            for name, batch in held.items():
                curve[name].append(_accuracy(model, _part(batch, 500)))
    model.eval()
    return curve


def _part(batch: GCogBatch, count: int) -> GCogBatch:
    return GCogBatch(*(tensor[:count] for tensor in batch))


@torch.no_grad()
def _accuracy(model: nn.Module, batch: GCogBatch, operators: tuple[str, ...] = OPERATORS) -> float:
    """Of the trials with these operators."""
    wanted = torch.tensor([OPERATORS.index(name) + 1 for name in operators])
    chosen = torch.isin(batch.rule[:, 0, 0].long(), wanted)
    right: Tensor = model(batch.rule[chosen], batch.stim[chosen]).argmax(-1) == batch.target[chosen]
    return float(right.float().mean())


def _balance(count: int, seed: int) -> dict[str, float]:
    """Share of true answers of each boolean operator."""
    batch = collate([*islice(GCog(n_distractors=(0, 5), seed=seed), count)])
    operator = batch.rule[:, 0, 0].long()
    return {
        name: float((batch.target[operator == OPERATORS.index(name) + 1] == 0).float().mean())
        for name in ("exist", *PARITY)
    }


def _claims(data: dict[str, Any]) -> list[Claim]:
    runs, balance = data["runs"], data["balance"]

    def of(name: str, split: str, group: str = "all") -> list[float]:
        return [one["train"] if split == "train" else one[split][group] for one in runs[name]]

    def both(split: str, group: str = "all") -> str:
        return ", ".join(_spread(of(name, split, group)) for name in _MODELS)

    def better(split: str, group: str = "all") -> bool:
        return mean(of("cross", split, group)) > mean(of("double", split, group))

    def far(name: str, group: str) -> list[float]:
        return [one["distractors"][group][-1] for one in runs[name]]

    pairs = list(zip(of("cross", "crossed pairs"), of("double", "crossed pairs"), strict=True))
    claims = [
        Claim(
            "accuracy on training trials with attention between the two",
            "≥ 90% (of enough training)",
            _spread(of("cross", "train")),
            mean(of("cross", "train")) >= 0.9,
        ),
        Claim(
            "look-ups with trained pairs: with attention, without",
            "with attention ≥ 90%, and better",
            both("trained pairs", "look-ups"),
            mean(of("cross", "trained pairs", "look-ups")) >= 0.9 and better("trained pairs", "look-ups"),
        ),
        Claim("place and parity with trained pairs, with attention", "",
              f"{_spread(of('cross', 'trained pairs', 'place'))}, {_spread(of('cross', 'trained pairs', 'parity'))}"),
        Claim("all operators with trained pairs: with attention, without", "with attention better",
              both("trained pairs"), better("trained pairs")),
        Claim(
            "all operators with crossed pairs: with attention, without",
            "with attention better, with each seed",
            f"{both('crossed pairs')}; better in {sum(a > b for a, b in pairs)} of {len(pairs)}",
            all(a > b for a, b in pairs),
        ),
    ]  # fmt: skip
    for group in list(_GROUPS)[1:]:
        claims.append(Claim(f"{group} with crossed pairs: with attention, without", "", both("crossed pairs", group)))
    return [
        *claims,
        Claim(
            f"look-ups with {data['distractors'][-1]} distractors (up to 5 in training): with attention, without",
            "with attention better",
            f"{_spread(far('cross', 'look-ups'))}, {_spread(far('double', 'look-ups'))}",
            mean(far("cross", "look-ups")) > mean(far("double", "look-ups")),
        ),
        Claim(
            "share of true answers of exist and the four parity operators",
            "45% to 55%",
            ", ".join(f"{share:.1%}" for share in balance.values()),
            all(0.45 < share < 0.55 for share in balance.values()),
        ),
    ]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1%} ± {stdev(values):.1%}"


def draw(finding: Finding) -> "Figure":
    """Accuracy during training, by kind of operator on both splits, and against distractors."""
    figure: Figure = require("matplotlib.figure", "draw the figure").Figure(figsize=(13, 3.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    runs = finding.data["runs"]
    for name, found in runs.items():
        steps = found[0]["curve"]["step"]
        for split, style in (("trained pairs", "-"), ("crossed pairs", "--")):
            for i, one in enumerate(found):
                label = f"{_NAMES[name]}, {split}" if i == 0 else None
                first.plot(steps, one["curve"][split], style, color=_COLOURS[name], linewidth=1, label=label)
    first.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
    first.set_title("during training, each seed", fontsize=10)
    first.legend(fontsize=7)
    places = [(split, group) for split in ("trained pairs", "crossed pairs") for group in list(_GROUPS)[1:]]
    for shift, (name, found) in zip((-0.2, 0.2), runs.items(), strict=True):
        values = [[one[split][group] for one in found] for split, group in places]
        at = [i + shift for i in range(len(places))]
        error = [stdev(v) for v in values]
        second.bar(at, [mean(v) for v in values], 0.38, yerr=error, capsize=2, color=_COLOURS[name])
    second.set_xticks(range(len(places)), [f"{group}\n{split.split()[0]}" for split, group in places], fontsize=8)
    second.set(ylabel="accuracy", ylim=(0, 1.05))
    second.set_title("by kind of operator and pair", fontsize=10)
    more = finding.data["distractors"]
    for name, found in runs.items():
        for group, style in (("look-ups", "o-"), ("all", "s:")):
            rows = [one["distractors"][group] for one in found]
            means = [mean(column) for column in zip(*rows, strict=True)]
            third.plot(more, means, style, color=_COLOURS[name], label=f"{_NAMES[name]}, {group}")
    third.set(xlabel="distractors (up to 5 in training)", ylabel="accuracy", ylim=(0, 1.05))
    third.set_title("trained pairs among more objects", fontsize=10)
    third.legend(fontsize=7)
    return figure
