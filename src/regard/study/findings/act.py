"""Attention sinks inside the text, and what calibrating them is worth (arXiv:2406.15765)."""

import random
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.errors import require
from regard.methods.language.act import ACT, by_layer, head_gains
from regard.probes import Recording, record, recorded_averages, recorded_sinks
from regard.sites import apply
from regard.study.finding import Claim, Finding, Progress
from regard.study.findings.act_toy import toy
from regard.study.models import load
from regard.tasks.bootstrap import Bootstrap, paired_bootstrap
from regard.tasks.continuation import ContinuationItem, continuation_items, continuation_scores
from regard.tasks.text import english, tokenize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAST = 16  # tokens so close to the end of a text that few queries see them, which alone makes sinks of many
_DELIMITERS = set(".,;:!?\n")
_KINDS = ("first token", "hidden sinks, delimiters", "hidden sinks, words")
_COLOURS = ("#b0b7c0", "#d9822b", "#4878a8")


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    texts, length, searched, held_out, tried, draws = (1, 96, 4, 4, 2, 1) if quick else (4, 256, 24, 80, 12, 2)
    total = 3 + tried + 3 + draws
    report = on_progress or (lambda *_: None)
    report("a planted sink", 0, total)
    sizes = {"steps": 30, "layers": 1, "questions": 200} if quick else {"steps": 300}
    planted = toy(seed, **sizes)
    model, tokenizer = load("smollm2")
    tokens = tokenize(tokenizer, english())
    report("sinks of SmolLM2", 1, total)
    survey = _survey(model, tokenizer, tokens, texts, length)

    items = continuation_items(tokens, searched + held_out, seed=seed)
    search, rest = items[:searched], items[searched:]
    candidates = _strongest(model, search[:8], tried)
    gains = head_gains(
        model,
        lambda which: _answers(which, search)["chance"],
        heads=candidates,
        on_progress=lambda done, _: report("search for heads", 1 + done, total),
    )
    chosen = [head for head, gain in gains.items() if gain > 0]
    sets: dict[str, list[tuple[int, int]]] = {"unmodified": [], "calibrated": chosen}
    sets["rejected heads"] = [head for head in candidates if head not in chosen]
    drawn, config = random.Random(seed), _config(model)
    inner = range(2, config.num_hidden_layers - 1)
    others = {(layer, head) for layer in inner for head in range(config.num_attention_heads)}
    for i in range(draws):
        sets[f"random heads {i + 1}"] = drawn.sample(sorted(others - {*candidates}), len(chosen))
    answers = {}
    for at, (name, heads) in enumerate(sets.items()):
        report(f"held-out passages, {name}", 2 + tried + at, total)
        with apply(model, ACT(only_heads=by_layer(heads))):
            answers[name] = _answers(model, rest)
    report("done", total, total)
    settings = {
        "texts": texts,
        "tokens": length,
        "search_items": searched,
        "held_out_items": held_out,
        "heads_tried": tried,
    }
    data = {
        "survey": survey,
        "toy": planted,
        "gains": {f"{layer}.{head}": gain for (layer, head), gain in gains.items()},
        "chosen": chosen,
        "answers": answers,
    }
    return _finding(data, {**settings, "beta": 0.4, "threshold": 0.1}, seed)


def _survey(model: nn.Module, tokenizer: Any, tokens: Sequence[int], texts: int, length: int) -> dict[str, Any]:
    """Where the attention of each layer goes, in shares of it, over several texts; and the first text's averages."""
    stride = len(tokens) // texts
    shares: dict[tuple[int, str], float] = defaultdict(float)
    words: dict[str, float] = defaultdict(float)
    heads: dict[int, int] = defaultdict(int)
    example: dict[str, Any] = {}
    for at in range(texts):
        text = torch.tensor([tokens[at * stride : at * stride + length]])
        spelled = [tokenizer.decode([token]) for token in text[0].tolist()]
        delimiter = torch.tensor([_is_delimiter(word) for word in spelled])
        found = record(model, text)
        for layer, hidden in _hidden_sinks(found).items():
            mass = found.layers[layer].mass[0].double() / length / hidden.shape[0] / texts
            on_hidden = mass * hidden
            for kind, part in zip(_KINDS, (mass[:, 0], on_hidden[:, delimiter], on_hidden[:, ~delimiter]), strict=True):
                shares[layer, kind] += float(part.sum())
            heads[layer] += int(hidden.any(-1).sum())
            for place in hidden.any(0).nonzero()[:, 0].tolist():
                words[spelled[place]] += float(on_hidden[:, place].sum())
        if at == 0:
            layer = max(heads, key=lambda layer: sum(shares[layer, kind] for kind in _KINDS[1:]))
            average = recorded_averages(found)[layer][0].mean(0)
            example = {"words": spelled, "layer": layer, "average": [round(v, 5) for v in average.tolist()]}
    layers = range(_config(model).num_hidden_layers)
    return {
        "shares": {kind: [shares[layer, kind] for layer in layers] for kind in _KINDS},
        "heads_with_hidden_sinks": [heads[layer] / texts for layer in layers],
        "words": {word: words[word] for word in sorted(words, key=words.__getitem__, reverse=True)[:8]},
        "example": example,
    }


def _is_delimiter(word: str) -> bool:
    return bool(_DELIMITERS & {*word})


def _hidden_sinks(found: Recording) -> dict[int, Tensor]:
    """By layer (H, M): sinks after each head's first one, the last tokens apart."""
    hidden = {layer: (sinks & (sinks.cumsum(-1) > 1))[0] for layer, sinks in recorded_sinks(found).items()}
    for sinks in hidden.values():
        sinks[:, -_LAST:] = False
    return hidden


def _strongest(model: nn.Module, items: Sequence[ContinuationItem], count: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs with the most attention on hidden sinks, without the first two layers and the last."""
    found = record(model, torch.tensor([item.context for item in items]))
    share = {}
    for layer, sinks in recorded_sinks(found).items():
        hidden = sinks & (sinks.cumsum(-1) > 1)
        for head, mass in enumerate((found.layers[layer].mass * hidden).sum(-1).mean(0).tolist()):
            share[layer, head] = mass
    inner = [place for place in share if 2 <= place[0] < _config(model).num_hidden_layers - 1]
    return sorted(inner, key=lambda place: -share[place])[:count]


def _answers(model: nn.Module, items: Sequence[ContinuationItem]) -> dict[str, list[float]]:
    """By item, whether the right candidate is the likeliest, and its probability among all."""
    scores = continuation_scores(model, items)
    answers = torch.tensor([item.answer for item in items])
    chances = (scores * len(items[0].candidates[0])).softmax(-1).gather(1, answers[:, None])[:, 0]
    return {"right": (scores.argmax(-1) == answers).double().tolist(), "chance": chances.double().tolist()}


def _config(model: nn.Module) -> Any:
    return model.config


def _gain(answers: Mapping[str, Mapping[str, list[float]]], over: str, what: str, seed: int) -> Bootstrap:
    """Calibrated minus the mean of the sets whose names begin with `over`, item by item."""
    theirs = torch.tensor([of[what] for name, of in answers.items() if name.startswith(over)]).double().mean(0)
    ours = torch.tensor(answers["calibrated"][what]).double()
    return paired_bootstrap(lambda difference: difference.mean(-1), ours - theirs, seed=seed)


def _finding(data: dict[str, Any], settings: dict[str, Any], seed: int) -> Finding:
    survey, answers, planted = data["survey"], data["answers"], data["toy"]
    shares = survey["shares"]
    hidden = [a + b for a, b in zip(*(shares[kind] for kind in _KINDS[1:]), strict=True)]
    layers = len(hidden)
    strong = [layer for layer, share in enumerate(hidden) if share >= 0.1]
    mean = {kind: sum(shares[kind]) / layers for kind in _KINDS}
    with_sinks = sum(heads > 0 for heads in survey["heads_with_hidden_sinks"])
    first_word, of_word = max(survey["words"].items(), key=lambda item: item[1])
    of_word /= sum(hidden) or 1.0
    accuracy = {name: sum(of["right"]) / len(of["right"]) for name, of in answers.items()}
    drawn = [value for name, value in accuracy.items() if name.startswith("random")]
    random_accuracy = sum(drawn) / len(drawn)
    gain, chance = (_gain(answers, "unmodified", what, seed) for what in ("right", "chance"))
    over_random, over_random_chance = (_gain(answers, "random", what, seed) for what in ("right", "chance"))
    before, after = accuracy["unmodified"], accuracy["calibrated"]
    claims = (
        Claim(
            "layers with hidden sinks (after the first, and away from the end)",
            "most layers",
            f"{with_sinks} of {layers}; at least 10% of the attention in layers {_spans(strong)}",
            with_sinks > layers / 2,
        ),
        Claim(
            "share of all attention: first token / hidden sinks",
            "sinks are not only at position 0",
            f"{mean[_KINDS[0]]:.1%} / {sum(hidden) / layers:.1%}, at most {max(hidden):.0%} of a layer's",
            sum(hidden) / layers > 0.01,
        ),
        Claim(
            "what hidden sinks are: the token with most of their attention",
            "often of little meaning",
            f"{first_word!r} {of_word:.0%}; delimiters {sum(shares[_KINDS[1]]) / (sum(hidden) or 1.0):.0%}",
        ),
        Claim(
            "held-out accuracy, calibrated minus unmodified model",
            "above 0 (up to 0.073 for Llama-30B)",
            f"{before:.3f} to {after:.3f}: {gain}",
            gain.low > 0,
        ),
        Claim("the same, probability of the right answer", "above 0", str(chance), chance.low > 0),
        Claim(
            "held-out accuracy, calibrated minus as many random heads",
            "above 0",
            f"{random_accuracy:.3f} to {after:.3f}: {over_random}",
            over_random.low > 0,
        ),
        Claim(
            "the same, probability of the right answer", "above 0", str(over_random_chance), over_random_chance.low > 0
        ),
        Claim(
            "toy with a planted useless sink: accuracy planted, random heads calibrated, found heads calibrated",
            "the last is highest",
            f"{planted['planted']:.3f}, {planted['random heads']:.3f}, {planted['calibrated']:.3f} "
            f"(without the plant {planted['without plant']:.3f})",
            planted["calibrated"] > max(planted["planted"], planted["random heads"]),
        ),
    )
    found = ", ".join(f"{layer}.{head}" for layer, head in planted["chosen"]) or "none"
    sown = " and ".join(map(str, planted["planted heads"]))
    verdict = "shows" if gain.low > 0 else "is not certain" if gain.estimate > 0 else "does not show"
    summary = f"""
ACT takes 60% of their weight from attention sinks inside the text and gives it to the other tokens, in heads chosen by
search, without training. Here SmolLM2-135M-Instruct reads Python's English manual. A sink is a key whose mean weight,
over the queries that can see it, exceeds 0.1; the first sink of a head is left alone, the others are called hidden.

Sinks inside the text are real at this size: {with_sinks} of {layers} layers have heads with some, and in layers
{_spans(strong)} they draw {min((hidden[layer] for layer in strong), default=0.0):.0%} to {max(hidden):.0%} of all
attention. Most of it goes to one kind of token, {first_word!r} ({of_word:.0%}), not to punctuation; StreamingLLM's
first token gets {mean[_KINDS[0]]:.0%} on average.

The task: which of four continuations of 8 tokens follows a passage of 48, by likelihood; the wrong ones follow the
same token elsewhere. The {settings["heads_tried"]} heads with most attention on hidden sinks were calibrated one by one
on {settings["search_items"]} items, and those kept that raised the mean probability of the right answer (accuracy on so
few items is too coarse): {len(data["chosen"])} heads. On {settings["held_out_items"]} other items accuracy goes from
{before:.3f} to {after:.3f}, a difference of {gain} (95%, paired bootstrap over items), and {over_random} against as
many heads drawn from the rest of layers 2 to {layers - 2}. So a gain such as the published ones {verdict} on this task
and model. On a toy with a planted useless sink the search finds heads {found} (layer.head), where {sown} of every layer
were planted; calibrating them takes accuracy from {planted["planted"]:.3f} to {planted["calibrated"]:.3f}.
"""
    paragraphs = (textwrap.fill(paragraph.strip(), 120) for paragraph in summary.split("\n\n"))
    title = "Attention sinks inside the text, and calibrating them"
    return Finding("act", title, ("act",), "\n\n".join(paragraphs), claims, settings, data)


def _spans(layers: Sequence[int]) -> str:
    """3-6, 9"""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def draw(finding: Finding) -> "Figure":
    require("matplotlib", "draw the figure")
    from matplotlib.figure import Figure

    data = finding.data
    survey, answers, planted = data["survey"], data["answers"], data["toy"]
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    top, bottom = figure.subplots(2, 2, width_ratios=(1.5, 1))
    layers = range(len(survey["shares"][_KINDS[0]]))
    below = [0.0] * len(layers)
    for kind, colour in zip(_KINDS, _COLOURS, strict=True):
        share = survey["shares"][kind]
        top[0].bar(layers, share, bottom=below, color=colour, label=kind)
        below = [a + b for a, b in zip(below, share, strict=True)]
    top[0].set(xlabel="layer", ylabel="share of all attention", ylim=(0, 1), title="Where SmolLM2's attention goes")
    top[0].legend(frameon=False, fontsize=8)

    names = ["without plant", "planted", "random heads", "calibrated"]
    top[1].bar(names, [planted[name] for name in names], color=["#bbbbbb", "#bbbbbb", "#bbbbbb", _COLOURS[2]])
    top[1].axhline(1 / 6, color="#555555", linewidth=0.8, linestyle=":")
    top[1].set(ylabel="accuracy (dotted: chance)", ylim=(0, 1.05), title="Toy with a planted sink")
    top[1].tick_params(axis="x", labelrotation=15)

    words, layer, average = (survey["example"][name] for name in ("words", "layer", "average"))
    bottom[0].stem(range(len(words)), average, basefmt=" ", markerfmt=" ", linefmt="#4878a8")
    marks = [at for at, word in enumerate(words) if _is_delimiter(word)]
    bottom[0].plot(marks, [-0.015] * len(marks), "|", color=_COLOURS[1], markersize=5, label="delimiters")
    inner = range(len(words) - _LAST)
    for at in (at for at in inner if average[at] > 0.05):
        bottom[0].annotate(repr(words[at]), (at, average[at]), fontsize=8, ha="left", va="bottom")
    bottom[0].axhline(0.1, color="#555555", linewidth=0.8, linestyle=":")
    bottom[0].set(xlabel="position", ylabel="mean weight of the key", title=f"One text, layer {layer}, mean over heads")
    bottom[0].legend(frameon=False, fontsize=8)

    for at, (name, of) in enumerate(answers.items()):
        found = paired_bootstrap(lambda right: right.mean(-1), of["right"])
        spread = [[found.estimate - found.low], [found.high - found.estimate]]
        colour = _COLOURS[2] if name == "calibrated" else "#777777"
        bottom[1].errorbar(at, found.estimate, spread, fmt="o", color=colour, capsize=3)
    bottom[1].axhline(0.25, color="#555555", linewidth=0.8, linestyle=":")
    bottom[1].set(ylabel="accuracy (dotted: chance)", ylim=(0, 1), title="Which continuation? (held-out, 95%)")
    bottom[1].set_xticks(range(len(answers)), list(answers), rotation=15, ha="right", fontsize=8)
    return figure
