"""Retrieval heads of SmolLM2: who copies the needle, and what is left of the answers when they are blinded."""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from regard.methods.language.mask_heads import MaskHeads
from regard.probes import HeadScores, detect_retrieval_heads
from regard.sites import apply
from regard.study.finding import Claim, Finding, Progress
from regard.study.models import load
from regard.tasks import Needle, NeedleRun, english, needle_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOKENS = 17  # at most, of an answer
_OUTSIDE = 40  # random heads are not among so many best (15%; the paper takes them outside 100 of 1,024)

DETECT = (
    Needle(
        "The best snack on the night train to Lisbon is a warm chestnut cake with salted butter and plum jam.",
        "What is the best snack on the night train to Lisbon?",
        "a warm chestnut cake with salted butter and plum jam.",
    ),
    Needle(
        "The old lighthouse keeper keeps his spare keys under a blue ceramic frog beside the garden well.",
        "Where does the old lighthouse keeper keep his spare keys?",
        "under a blue ceramic frog beside the garden well.",
    ),
    Needle(
        "The mayor's parrot was arrested because it stole seven silver spoons and a trumpet from the museum.",
        "Why was the mayor's parrot arrested?",
        "it stole seven silver spoons and a trumpet from the museum.",
    ),
    Needle(
        "The winner of the village swimming race received a purple umbrella, two tame geese and a jar of mustard.",
        "What did the winner of the village swimming race receive?",
        "a purple umbrella, two tame geese and a jar of mustard.",
    ),
)
TEST = (
    Needle(
        "The retired dentist spends every winter painting tiny horses on matchboxes for children in Norway.",
        "How does the retired dentist spend every winter?",
        "painting tiny horses on matchboxes for children in Norway.",
    ),
    Needle(
        "The hidden door in the bakery opens when someone whistles an old sailor song and knocks on the copper oven.",
        "When does the hidden door in the bakery open?",
        "someone whistles an old sailor song and knocks on the copper oven.",
    ),
    Needle(
        "The queen's favourite breakfast is smoked trout on black bread with gooseberry sauce.",
        "What is the queen's favourite breakfast?",
        "smoked trout on black bread with gooseberry sauce.",
    ),
    Needle(
        "The first tram on Sunday stops for a brass band, three nuns and a very tired donkey.",
        "For whom does the first tram on Sunday stop?",
        "a brass band, three nuns and a very tired donkey.",
    ),
)


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Detect on four needles, blind and ask for four others: four minutes on one core."""
    lengths, depths = ((200,), (0.5,)) if quick else ((400, 800), (0.2, 0.8))
    ks, draws, needles = ((0, 4), 1, 2) if quick else ((0, 2, 5, 10, 20, 30), 2, 4)
    model, tokenizer = load("smollm2")
    pages = english()
    texts = [pages[i * len(pages) // 8 :].partition("\n\n")[2] for i in range(8)]

    def runs_of(which: Sequence[Needle], text: Sequence[str], cells: Sequence[tuple[int, float]]) -> list[NeedleRun]:
        each = list(zip(which[:needles], text, strict=False))
        return [needle_run(tokenizer, t, n, length, depth, primed=True) for n, t in each for length, depth in cells]

    runs = runs_of(DETECT, texts, [(length, depth) for length in lengths for depth in depths])
    tests = runs_of(TEST, texts[4:], [(sum(lengths) // len(lengths), 0.5)])
    controls = 2 * draws if len(ks) > 2 else draws
    total = len(runs) + (len(ks) - 1) * (1 + controls) + 4

    def step(done: int, what: str) -> None:
        if on_progress is not None:
            on_progress(what, done, total)

    found = detect_retrieval_heads(
        model, tokenizer, runs, max_new_tokens=_TOKENS, on_progress=lambda done, _: step(done, "detection")
    )
    ask = _Asker(model, tokenizer, tests)
    curves: dict[str, list[list[float]]] = {}
    done = len(runs)
    for name, order in _orders(found, draws, seed, controls > draws):
        curves[name] = []
        for k in ks:
            if k == 0 and "top" in curves and name != "top":
                curves[name].append(curves["top"][0])
                continue
            done += 0 if k == 0 else 1
            curves[name].append(ask(order[:k]))
            step(min(done, total), "masking")
    k = 10 if 10 in ks else ks[-1]
    whole = {name: ask(order[:k], whole=True) for name, order in _orders(found, 1, seed, False)}
    step(total, "masking")
    return _finding(found, runs, tests, ks, curves, whole, k, (lengths, depths))


def _orders(found: HeadScores, draws: int, seed: int, layers: bool) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Lists of heads, of which the first k are blinded: the best, random others, others of the best ones' layers."""
    ranking = found.ranking()
    yield "top", ranking
    for draw in range(draws):
        yield f"random {draw}", found.random_heads(_OUTSIDE, _OUTSIDE, seed + draw)
    if not layers:
        return
    best = {layer for layer, _ in found.retrieval_heads()}
    for draw in range(draws):
        shuffled = found.random_heads(len(ranking) - _OUTSIDE, _OUTSIDE, seed + draw)
        yield f"same layers {draw}", [head for head in shuffled if head[0] in best]


class _Asker:
    """Asks all questions with some heads blind, those of one length at once, and gives their recalls."""

    def __init__(self, model: Any, tokenizer: Any, runs: Sequence[NeedleRun]) -> None:
        self.model, self.tokenizer = model, tokenizer
        lengths = sorted({len(run.prompt) for run in runs})
        self.groups = [[run for run in runs if len(run.prompt) == length] for length in lengths]
        self.caches: list[Any] = [None] * len(self.groups)

    @torch.no_grad()
    def __call__(self, blind: Sequence[tuple[int, int]], *, whole: bool = False) -> list[float]:
        """Recalls; `whole`: blind in the prompt as well, and not only while the answer is decoded, as published."""
        recalls = []
        for i, runs in enumerate(self.groups):
            ids = torch.tensor([run.prompt for run in runs])
            methods = [MaskHeads(targets=blind, decoding_only=not whole)] if blind else []
            if whole or self.caches[i] is None:
                with apply(self.model, methods if whole else []):
                    cache = self.model.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
                self.caches[i] = self.caches[i] if whole else cache
            cache = cache if whole else self.caches[i]
            with apply(self.model, methods):
                said = self._decode(ids, cache)
            cache.crop(ids.shape[1] - 1 - cache.get_seq_length())  # what was decoded
            recalls += [run.recall(self._text(tokens)) for run, tokens in zip(runs, said, strict=True)]
        return recalls

    def _decode(self, ids: torch.Tensor, cache: Any) -> list[list[int]]:
        token, said = ids[:, -1:], []
        for _ in range(_TOKENS):
            token = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            said.append(token)
        return torch.cat(said, 1).tolist()

    def _text(self, tokens: list[int]) -> str:
        """Up to the end of the text or the line."""
        end = self.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        return self.tokenizer.decode(tokens).strip().partition("\n")[0]


def _finding(
    found: HeadScores,
    runs: Sequence[NeedleRun],
    tests: Sequence[NeedleRun],
    ks: Sequence[int],
    curves: dict[str, list[list[float]]],
    whole: dict[str, list[float]],
    whole_k: int,
    grid: tuple[Sequence[int], Sequence[float]],
) -> Finding:
    mean, heads = found.mean, found.retrieval_heads()
    share, best = len(heads) / mean.numel(), found.ranking()[:10]
    everywhere = int((found.counts == len(found.scores)).sum())
    recall = {name: [fmean(each) for each in curve] for name, curve in curves.items()}
    groups = {
        group: [[values[i] for name, values in recall.items() if name.startswith(group)] for i in range(len(ks))]
        for group in ("top", "random", "same layers")
    }
    at = ks.index(whole_k)
    top, random = groups["top"][at][0], groups["random"][at]
    agreement, common = _stability(found, runs)
    claims = [
        Claim(
            "retrieval heads (mean score of 0.1 or more)",
            "fewer than 5% of all heads",
            f"{len(heads)} of {mean.numel()} ({share:.1%})",
            share < 0.05,
        ),
        Claim(
            "scores of the best and the tenth head",
            "0.94 and 0.40 (Llama-2-7B-80K)",
            f"{float(mean[best[0]]):.2f} (layer {best[0][0]}, head {best[0][1]}) and {float(mean[best[-1]]):.2f}",
        ),
        Claim(
            "heads that copy in every kept run",
            "some do in every context (12 of Llama-2-7B's 1,024)",
            f"{everywhere} of {mean.numel()}, in {len(found.scores)} of {len(runs)} runs",
            everywhere > 0,
        ),
        Claim(
            f"recall of held-out needles with {ks[at]} heads blind while the answer is decoded",
            "far lower for the best heads than for random ones",
            f"{top:.2f} for the best, {fmean(random):.2f} ({min(random):.2f} to {max(random):.2f}) for random others, "
            f"{groups['top'][0][0]:.2f} with none",
            top < 0.5 * min(random),
        ),
        Claim(
            "ranking between needles",
            "heads are the same for every needle and context",
            f"rank correlation {agreement:.2f} among heads that ever copy, {common:.1f} of the ten best in common",
            common >= 5,
        ),
        Claim(
            f"recall with {whole_k} heads blind in the prompt as well",
            "not reported",
            f"{fmean(whole['top']):.2f} for the best, "
            f"{fmean(fmean(v) for k, v in whole.items() if k != 'top'):.2f} for random others",
        ),
    ]
    if any(groups["same layers"]):
        near = groups["same layers"][at]
        claims.insert(
            4,
            Claim(
                f"the same with {ks[at]} random others of the layers that hold retrieval heads",
                "not reported",
                f"{fmean(near):.2f} ({min(near):.2f} to {max(near):.2f})",
                top < 0.5 * min(near),
            ),
        )
    return Finding(
        name="retrieval-heads",
        title="A few heads of SmolLM2 copy the answer, and without them it is lost",
        systems=("retrieval-heads",),
        summary=f"""
SmolLM2-135M-Instruct is asked for a sentence hidden in {" or ".join(map(str, grid[0]))} tokens of Python's manual; the
question ends with the sentence's own first words, because without them so small a model does not answer. A head
scores when, in the step that says a token of the answer, the key it looks at most is that very token in the text.
Scores are means over the {len(found.scores)} of {len(runs)} runs in which the answer came out. Then heads are blinded
(query zero: they attend to everything alike) while the answer to {len(tests)} other questions, about other sentences
in other parts of the manual, is decoded, in prompts of {len(tests[0].prompt)}
tokens: the best heads, random ones outside the {_OUTSIDE} best, and random ones
outside them but in the same layers as retrieval heads.

{_verdict(ks, groups)}
""",
        claims=tuple(claims),
        settings={"lengths": list(grid[0]), "depths": list(grid[1]), "draws": len(groups["random"][0])},
        data={
            "scores": [[round(x, 4) for x in row] for row in mean.tolist()],
            "threshold": found.threshold,
            "k": list(ks),
            "recall": recall,
            "responses": list(found.responses),
        },
    )


def _verdict(ks: Sequence[int], groups: dict[str, list[list[float]]]) -> str:
    parts = []
    for group, words in (("top", "The best"), ("random", "random others"), ("same layers", "others of their layers")):
        values = [fmean(each) for each in groups[group] if each]
        if values:
            parts.append(f"{words} {', '.join(f'{v:.2f}' for v in values)}")
    return f"Mean recall with {', '.join(map(str, ks))} heads blind: " + "; ".join(parts) + "."


def _stability(found: HeadScores, runs: Sequence[NeedleRun]) -> tuple[float, float]:
    """Between the needles, means over their pairs: rank correlation of scores, and common heads among the ten best."""
    names = [run.needle.text for run, kept in zip(runs, found.kept, strict=True) if kept]
    alive = found.mean.flatten() > 0
    means = [
        found.scores[[i for i, name in enumerate(names) if name == text]].mean(0).flatten()[alive]
        for text in dict.fromkeys(names)
    ]
    pairs = [(a, b) for i, a in enumerate(means) for b in means[:i]]
    if not pairs:
        return float("nan"), float("nan")
    ranked: Callable[[torch.Tensor], torch.Tensor] = _ranks
    correlation = fmean(float(torch.corrcoef(torch.stack([ranked(a), ranked(b)]))[0, 1]) for a, b in pairs)
    common = fmean(len({*a.topk(10).indices.tolist()} & {*b.topk(10).indices.tolist()}) for a, b in pairs)
    return correlation, common


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, equal values sharing their mean rank."""
    lower, upper = ((values[:, None] > values).sum(1), (values[:, None] >= values).sum(1))
    return (lower + upper - 1).double() / 2


def draw(finding: Finding) -> "Figure":
    """Scores of all heads as a map and sorted, and recall against the number of blind heads."""
    from matplotlib.figure import Figure

    data = finding.data
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1.4, 2))
    scores = torch.tensor(data["scores"])
    image = left.imshow(scores.T, aspect="auto", cmap="magma", vmin=0, vmax=1)
    left.set(xlabel="layer", ylabel="head", title="retrieval score")
    figure.colorbar(image, ax=left)
    ordered = scores.flatten().sort(descending=True).values
    middle.plot(range(1, len(ordered) + 1), ordered, color="black")
    middle.axhline(data["threshold"], color="grey", linestyle=":")
    middle.set(xlabel="heads, best first", ylabel="retrieval score", xscale="log", title="sorted")
    ks = data["k"]
    groups = (("top", "the best", "C3"), ("random", "random others", "C0"), ("same layers", "same layers", "C2"))
    for group, label, colour in groups:
        curves = torch.tensor([values for name, values in data["recall"].items() if name.startswith(group)])
        if not len(curves):
            continue
        right.plot(ks, curves.mean(0), "o-", color=colour, label=label)
        right.fill_between(ks, curves.amin(0), curves.amax(0), color=colour, alpha=0.2, linewidth=0)
    right.set(xlabel="blind heads", ylabel="recall of the answer", ylim=(-0.03, 1.03), title="held-out needles")
    right.legend()
    return figure
