"""What models produce beside what they recognise (arXiv:2311.00059): a toy from its first steps on, and SmolLM2."""

import math
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from regard.errors import require
from regard.study.finding import Claim, Finding, Progress
from regard.study.findings.generative_ai_paradox_toy import CHOICES, toy
from regard.study.models import load
from regard.tasks.bootstrap import Bootstrap, paired_bootstrap
from regard.tasks.paradox import ParadoxItem, ParadoxReport, read_letter, select_by_likelihood, shuffled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: country, capital, and three other cities of it: the near misses
_CAPITALS = (
    ("France", "Paris", "Lyon", "Marseille", "Nice"),
    ("Italy", "Rome", "Milan", "Naples", "Turin"),
    ("Spain", "Madrid", "Barcelona", "Valencia", "Seville"),
    ("Germany", "Berlin", "Munich", "Hamburg", "Frankfurt"),
    ("Canada", "Ottawa", "Toronto", "Montreal", "Vancouver"),
    ("Australia", "Canberra", "Sydney", "Melbourne", "Perth"),
    ("Brazil", "Brasília", "Rio de Janeiro", "São Paulo", "Salvador"),
    ("China", "Beijing", "Shanghai", "Guangzhou", "Wuhan"),
    ("India", "New Delhi", "Mumbai", "Chennai", "Bangalore"),
    ("Turkey", "Ankara", "Istanbul", "Izmir", "Bursa"),
    ("Egypt", "Cairo", "Alexandria", "Luxor", "Giza"),
    ("Morocco", "Rabat", "Casablanca", "Marrakesh", "Fez"),
    ("Poland", "Warsaw", "Kraków", "Gdańsk", "Wrocław"),
    ("Portugal", "Lisbon", "Porto", "Braga", "Coimbra"),
    ("Switzerland", "Bern", "Zurich", "Geneva", "Basel"),
    ("Vietnam", "Hanoi", "Ho Chi Minh City", "Da Nang", "Hue"),
    ("Pakistan", "Islamabad", "Karachi", "Lahore", "Peshawar"),
    ("Scotland", "Edinburgh", "Glasgow", "Aberdeen", "Dundee"),
    ("Cuba", "Havana", "Santiago de Cuba", "Camagüey", "Holguín"),
    ("Russia", "Moscow", "Saint Petersburg", "Kazan", "Samara"),
)
_SHOT = "The capital of Japan is Tokyo. "
_SHARED = 0.5  # of the simulated sets: share of items on which g and s hang together
_G, _U = 0.7, 0.5


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    steps, items, sets = ((10, 20), 8, 40) if quick else ((10, 25, 50, 100, 200), 80, 500)
    countries = 3 if quick else len(_CAPITALS)
    total = len(steps) + 2 + 2 * countries
    report = on_progress or (lambda *_: None)
    coverage = _coverage(sets, seed)
    trained = [
        _numbers(ParadoxReport.from_items(found, seed=seed))
        for found in toy(seed, steps, items, lambda done: report("toy that copies and reverses", done, total))
    ]
    at = len(steps) + 1
    report("SmolLM2", at, total)
    by_likelihood, by_letter = _smollm2(countries, seed, lambda done: report("SmolLM2", min(at + done, total), total))
    report("done", total, total)
    data = {
        "steps": list(steps),
        "toy": trained,
        "likelihood": _numbers(ParadoxReport.from_items(by_likelihood, seed=seed)),
        "letter": _numbers(ParadoxReport.from_items(by_letter, seed=seed)),
        "said_yes": sum(item.answers == ("yes",) for item in by_likelihood if item.hardness == "easy"),
        "coverage": coverage,
        "generations": {item.id: item.generation for item in by_likelihood if item.hardness == "easy"},
    }
    return _finding(data, {"toy_items": items, "countries": countries, "simulated_sets": sets})


@dataclass
class _Reader:
    """SmolLM2 answering in text and by likelihood."""

    model: Any
    tokenizer: Any

    def write(self, prompt: str, tokens: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def pick(self, context: str, candidates: Sequence[str]) -> int:
        return select_by_likelihood(self.model, self.tokenizer, context, candidates).selected


def _smollm2(count: int, seed: int, on_item: Callable[[int], None]) -> tuple[list[ParadoxItem], list[ParadoxItem]]:
    """Capitals, produced, picked by likelihood and picked by letter; records of the two ways to pick."""
    reader = _Reader(*load("smollm2"))
    chosen = _CAPITALS[:count]
    drawn = random.Random(seed)
    by_likelihood, by_letter = [], []
    for done, (country, capital, *cities) in enumerate(chosen):
        context = f"{_SHOT}The capital of {country} is"
        written = reader.write(context, 6).split(".")[0].split(",")[0].split("\n")[0].strip()
        right = written.startswith(capital)
        question = f"Is {written} the capital of {country}?"
        said = ("yes", "no")[reader.pick(f"Question: {question} Answer yes or no.\nAnswer:", [" yes", " no"])]
        others = drawn.sample([c[1] for c in _CAPITALS if c[1] != capital], CHOICES - 1)
        for hardness, wrong in (("easy", others), ("hard", cities)):
            candidates = shuffled(capital, wrong, seed + done)
            item = ParadoxItem(
                country, "capitals", context, capital, candidates, "easy" if hardness == "easy" else "hard",
                seed + done, written, float(right), questions=(question,), answers=(said,),
                answer_scores=(float((said == "yes") == right),),
            )  # fmt: skip
            picked = reader.pick(context, [f" {candidate}" for candidate in candidates])
            by_likelihood.append(replace(item, selected=picked))
            options = "\n".join(f"{'ABCD'[i]}. {candidate}" for i, candidate in enumerate(candidates))
            prompt = f"Which city is the capital of {country}?\n{options}\nThe letter of the right answer is"
            by_letter.append(replace(item, selected=read_letter(reader.write(prompt, 3), CHOICES)))
            on_item(2 * done + (hardness == "hard"))
    return by_likelihood, by_letter


def _coverage(sets: int, seed: int) -> float:
    """Share of simulated sets of 200 items whose 95% interval of the gap holds the true one."""
    generator, covered = torch.Generator().manual_seed(seed), 0
    for trial in range(sets):
        shared = torch.rand(200, generator=generator) < _SHARED
        luck = torch.rand(3, 200, generator=generator)
        g, s = luck[0] < _G, torch.where(shared, luck[0], luck[1]) < _U
        found = paired_bootstrap(lambda d: d.mean(-1), g.double() - s.double(), resamples=500, seed=trial)
        covered += found.low <= _G - _U <= found.high
    return covered / sets


def _numbers(report: ParadoxReport) -> dict[str, Any]:
    """The summary with None for what is undefined, which JSON has no number for."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(part) for name, part in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    found: dict[str, Any] = known(report.summary())
    return found


def _finding(data: dict[str, Any], settings: dict[str, Any]) -> Finding:
    trained, likelihood, letter = data["toy"], data["likelihood"], data["letter"]
    last = trained[-1]
    drops = [_value(found, "brittleness") for found in trained]
    claims = (
        Claim(
            f"toy: picked right among random strings minus among near misses, after {_words(data['steps'])} steps",
            "not below 0",
            ", ".join(f"{drop:+.3f}" for drop in drops),
            min(drops) >= 0,
        ),
        Claim("toy at the end: G - U, near misses", "above 0 (the paradox)", *_signed(last, "gap_hard")),
        Claim("SmolLM2, capitals: G - U by likelihood, near misses", "above 0", *_signed(likelihood, "gap_hard")),
        Claim("SmolLM2: G - U by option letter, near misses", "above 0", *_signed(letter, "gap_hard")),
        Claim("SmolLM2: brittleness by likelihood (easy minus hard)", "above 0", *_signed(likelihood, "brittleness")),
        Claim("SmolLM2: brittleness by letter", "above 0", *_signed(letter, "brittleness")),
        Claim(
            "SmolLM2: correlation of g and s by likelihood, near misses", "weak", _text(likelihood, "correlation_hard")
        ),
        Claim("SmolLM2: r by letter, near misses", "weak", _text(letter, "correlation_hard")),
        Claim(
            "SmolLM2: of its right answers, share it denies when asked",
            "above 0",
            f"{_percent(likelihood['interrogative_error'])}; it says yes {data['said_yes']} times in "
            f"{settings['countries']}, so this tells more of its bias than of its judgement",
        ),
        Claim(
            "95% bootstrap interval of the gap: share of simulated sets that it covers",
            "0.93 to 0.97",
            f"{data['coverage']:.3f}",
            0.93 <= data["coverage"] <= 0.97,
        ),
    )
    if all(_value(found, "U_hard") >= _value(found, "G") for found in trained):
        verdict = "Picking by likelihood never lags behind producing here: the paradox runs the other way."
    else:
        verdict = "At some point picking by likelihood lags behind producing."
    unread = sum(letter["unparseable"].values())
    summary = f"""
The paradox: a model may be better at producing answers than at recognising them. Its comparison is with people, whose
scores are inputs of `regard.tasks.paradox.ParadoxReport`; none are supplied, so only the model's own sides are set
against each other here: G, the share produced right, and U, the share picked right among {CHOICES} (chance
{1 / CHOICES:.2f}), with wrong candidates that are easy (of other items) or hard (near misses).

A two-layer toy is trained only to produce: it copies or reverses six symbols. After {_words(data["steps"])} steps it
produces {_words([f"{_value(t, 'G'):.2f}" for t in trained])} right, and likelihood picks the right string among near
misses (one symbol changed) {_words([f"{_value(t, 'U_hard'):.2f}" for t in trained])} of the time, among random strings
{_words([f"{_value(t, 'U_easy'):.2f}" for t in trained])}. {verdict}

SmolLM2-135M-Instruct names capitals of {settings["countries"]} countries: G = {_value(likelihood, "G"):.2f}. By
likelihood it picks {_value(likelihood, "U_easy"):.2f} among other capitals and {_value(likelihood, "U_hard"):.2f} among
other cities of the country; asked for the letter of the right option, {_value(letter, "U_easy"):.2f} and
{_value(letter, "U_hard"):.2f} ({unread} answers without a letter). Asked whether its own answer is the capital, it says
yes {data["said_yes"]} times in {settings["countries"]} and is right {_value(likelihood, "U_interrogative"):.2f} of the
time. So what the gap is depends on how understanding is asked for: by likelihood, selection agrees with production
item by item; by letter or by a question the same weights answer near chance, or always alike. With
{settings["countries"]} items the intervals are wide.
"""
    paragraphs = (textwrap.fill(paragraph.strip(), 120) for paragraph in summary.split("\n\n"))
    title = "What models produce, beside what they recognise"
    return Finding(
        "generative-ai-paradox", title, ("generative-ai-paradox",), "\n\n".join(paragraphs), claims, settings, data
    )


def _value(found: Mapping[str, Any], name: str) -> float:
    estimate = found[name]["estimate"]
    return math.nan if estimate is None else float(estimate)


def _text(found: Mapping[str, Any], name: str) -> str:
    part = found[name]
    if not part["defined"]:
        return "undefined: a series is constant"
    return str(Bootstrap(part["estimate"], part["low"], part["high"], part["p_positive"], part["p_negative"]))


def _signed(found: Mapping[str, Any], name: str) -> tuple[str, bool]:
    """The measure, and whether it is surely above 0."""
    low = found[name].get("low")
    return _text(found, name), low is not None and low > 0


def _percent(share: float | None) -> str:
    return "none were right" if share is None else f"{share:.0%}"


def _words(values: Sequence[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def draw(finding: Finding) -> "Figure":
    require("matplotlib", "draw the figure")
    from matplotlib.figure import Figure

    data = finding.data
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    series = (
        ("G", "produced", "#222222"),
        ("U_easy", "picked, easy", "#8fb3d9"),
        ("U_hard", "picked, hard", "#d9822b"),
    )
    for name, label, colour in series:
        points = _points([found[name] for found in data["toy"]])
        left.errorbar(data["steps"], *points, color=colour, label=label, marker="o", capsize=3)
    left.set(xscale="log", xlabel="training steps", ylabel="share right", title="Toy that copies and reverses")
    left.legend(frameon=False)

    bars = [("produced", data["likelihood"]["G"], "#222222")]
    for how in ("likelihood", "letter"):
        for name, _, colour in series[1:]:
            bars.append((f"{name[2:]},\n{how}", data[how][name], colour))
    bars.append(("own answer\njudged", data["likelihood"]["U_interrogative"], "#8a8a8a"))
    values, spread = _points([part for _, part, _ in bars])
    right.bar(range(len(bars)), values, yerr=spread, color=[colour for *_, colour in bars], capsize=3)
    right.set_xticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    right.set(ylabel="share right (95%)", ylim=(0, 1.05), title="SmolLM2: capitals")
    for axes in (left, right):
        axes.axhline(1 / CHOICES, color="#555555", linewidth=0.8, linestyle=":")
    return figure


def _points(parts: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Estimates, and how far their intervals reach down and up."""
    values = [part["estimate"] for part in parts]
    low = [value - min(part["low"], value) for value, part in zip(values, parts, strict=True)]
    high = [max(part["high"], value) - value for value, part in zip(values, parts, strict=True)]
    return values, [low, high]
