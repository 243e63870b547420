"""Scores by item, and what the paradox's hypotheses ask of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.bootstrap import paired_bootstrap
from regard.tasks.paradox.items import ParadoxItem

Scores = Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class ParadoxReport:
    """Scores of one answerer, the same T items in the same order in all of them (arXiv:2311.00059).

    With generation g and understanding s by item: G = mean g, U = mean s, gap = G - U, correlation = Pearson r of g and
    s, brittleness = mean of s_easy - s_hard; each with a paired bootstrap interval, and its difference from people's.

        ParadoxReport(generation=g, selective_easy=easy, selective_hard=hard).summary()["gap_hard"]["estimate"]

    Args:
        generation: quality of what was produced, 0 to 1; NaN where it has none: such an item drops out of whatever
            needs both.
        selective_easy, selective_hard: 1 where the right candidate was picked, else 0; NaN for an answer that could
            not be read, which counts as wrong and is reported.
        interrogative: share of questions about the own output answered right; NaN where none was asked.
        human: the report of people on the same items.
        resamples, seed: of the paired bootstrap over items.

    Raises:
        ArgumentError: scores outside 0 to 1, no items, or different numbers of items.
    """

    generation: Scores
    selective_easy: Scores
    selective_hard: Scores | None = None
    interrogative: Scores | None = None
    human: "ParadoxReport | None" = None
    resamples: int = 1000
    seed: int = 0

    _SERIES: ClassVar = ("generation", "selective_easy", "selective_hard", "interrogative")

    def __post_init__(self) -> None:
        count = len(self.generation)
        for name, scores in self._given().items():
            if scores.dim() != 1 or len(scores) != count or count == 0:
                raise ArgumentError(f"{name}: expected {count} scores, at least one, got {tuple(scores.shape)}")
            if bool(((scores < 0) | (scores > 1)).any()):
                raise ArgumentError(f"{name}: expected scores from 0 to 1, got {scores.min():g} to {scores.max():g}")
        if self.human is not None and len(self.human.generation) != count:
            raise ArgumentError(f"human: expected scores of the same {count} items, got {len(self.human.generation)}")

    @classmethod
    def from_items(cls, items: Sequence[ParadoxItem], **arguments: Any) -> "ParadoxReport":
        """From records; items at both hardnesses must be the same ones.

        Raises:
            ArgumentError: an id twice at a hardness, or other ids among the easy than among the hard.
        """
        by = {hardness: {i.id: i for i in items if i.hardness == hardness} for hardness in ("easy", "hard")}
        if len(by["easy"]) + len(by["hard"]) != len(items) or (by["hard"] and by["hard"].keys() != by["easy"].keys()):
            raise ArgumentError("items: expected each id once as easy, and either all of them or none as hard")
        easy, hard = list(by["easy"].values()), [by["hard"][key] for key in by["easy"] if by["hard"]]
        asked = [sum(i.answer_scores) / len(i.answer_scores) if i.answer_scores else math.nan for i in easy]
        return cls(
            [math.nan if i.generation_score is None else i.generation_score for i in easy],
            [i.selection_score for i in easy],
            [i.selection_score for i in hard] if hard else None,
            None if all(map(math.isnan, asked)) else asked,
            **arguments,
        )

    def summary(self) -> dict[str, Any]:
        """Everything the paper's hypotheses ask for.

        Returns:
            ``G``; ``U_easy``, ``U_hard``, ``U_interrogative``; ``gap_*`` = G - U_*; ``correlation_*`` with g;
            ``brittleness``; each as `Bootstrap`'s fields. A correlation says whether it is ``defined``: a constant
            series has none, and its estimate is NaN. ``interrogative_error``: of the items produced right (g = 1), the
            share with a question answered wrong. ``unparseable``: by series. With ``human`` also ``*_minus_human`` and
            ``hypotheses``, by number whether each holds (None where something it needs is missing).
        """
        out: dict[str, Any] = {"items": len(self.generation)}
        out |= {name: self._measure(self, name) for name in self._measures()}
        given = self._given()
        out["unparseable"] = {n: int(s.isnan().sum()) for n, s in given.items() if n.startswith("selective")}
        if self.interrogative is not None:
            asked = (given["generation"] == 1) & ~given["interrogative"].isnan()
            wrong = given["interrogative"][asked] < 1
            out["interrogative_error"] = float(wrong.double().mean()) if len(wrong) else math.nan
        if self.human is not None:
            shared = [name for name in self._measures() if name in self.human._measures() and "gap" not in name]
            out |= {f"{name}_minus_human": self._measure(self, name, self.human) for name in shared}
            out["hypotheses"] = _hypotheses(out)
        return out

    def _given(self) -> dict[str, Tensor]:
        named = ((name, getattr(self, name)) for name in self._SERIES)
        return {name: torch.as_tensor(s, dtype=torch.float64) for name, s in named if s is not None}

    def _scores(self) -> dict[str, Tensor]:
        """By short name; what could not be read is wrong."""
        short = {"generation": "G", "selective_easy": "U_easy", "selective_hard": "U_hard"}
        return {
            short.get(name, "U_interrogative"): s.nan_to_num(0.0) if name.startswith("selective") else s
            for name, s in self._given().items()
        }

    def _measures(self) -> list[str]:
        scores = list(self._scores())
        kinds = [name.removeprefix("U_") for name in scores if name != "G"]
        brittle = ["brittleness"] if "U_hard" in scores else []
        return scores + [f"{what}_{kind}" for what in ("gap", "correlation") for kind in kinds] + brittle

    def _measure(self, own: "ParadoxReport", name: str, other: "ParadoxReport | None" = None) -> dict[str, Any]:
        """A measure, or its difference from another answerer's, with its interval."""
        series = [own._series(name)] + ([] if other is None else [other._series(name)])
        flat = [row for rows in series for row in rows]
        keep = ~torch.stack(flat).isnan().any(0)
        if not keep.any():
            return {"estimate": math.nan, "defined": False}
        width = len(series[0])
        statistic = _pearson if name.startswith("correlation") else _mean_difference

        def measured(*rows: Tensor) -> Tensor:
            parts = [statistic(*rows[at : at + width]) for at in range(0, len(rows), width)]
            return parts[0] if other is None else parts[0] - parts[1]

        found = paired_bootstrap(measured, *(row[keep] for row in flat), resamples=self.resamples, seed=self.seed)
        return {**asdict(found), "defined": not math.isnan(found.estimate)}

    def _series(self, name: str) -> list[Tensor]:
        """The score, or the two that a measure is made of."""
        scores = self._scores()
        if name in scores:
            return [scores[name]]
        if name == "brittleness":
            return [scores["U_easy"], scores["U_hard"]]
        return [scores["G"], scores["U_" + name.partition("_")[2]]]


def by_domain(items: Sequence[ParadoxItem], **arguments: Any) -> dict[str, ParadoxReport]:
    """A report for each domain."""
    domains = dict.fromkeys(item.domain for item in items)
    return {name: ParadoxReport.from_items([i for i in items if i.domain == name], **arguments) for name in domains}


def _mean_difference(a: Tensor, b: Tensor | None = None) -> Tensor:
    return a.mean(-1) if b is None else (a - b).mean(-1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over the last axis (point-biserial where one is binary); NaN where either is constant."""
    constant = (a == a[..., :1]).all(-1) | (b == b[..., :1]).all(-1)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    r = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return r.masked_fill(constant, torch.nan)


def _hypotheses(found: Mapping[str, Any]) -> dict[str, bool | None]:
    """The three of the paper, from signs of estimates; hard distractors are asked where there are some."""
    kind = "hard" if "U_hard_minus_human" in found else "easy"

    def sign(name: str) -> float | None:
        estimate = found.get(f"{name}_minus_human", {}).get("estimate", math.nan)
        return None if math.isnan(estimate) else estimate

    g, u, r, brittle = (sign(name) for name in ("G", f"U_{kind}", f"correlation_{kind}", "brittleness"))
    return {
        "1": None if g is None or u is None else g >= 0 and u < 0,
        "2": None if r is None else r < 0,
        "3": None if brittle is None else brittle > 0,
    }
