"""The paradox protocol: the card's hand cases, its numbers in loops, records, and likelihood selection by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError
from regard.tasks.bootstrap import paired_bootstrap
from regard.tasks.paradox import (
    ParadoxItem,
    ParadoxReport,
    by_domain,
    read_letter,
    read_records,
    select_by_likelihood,
    shuffled,
    write_records,
)
from tests.tiny_models import tiny
from tests.tiny_tokenizer import tiny_tokenizer

NAN = math.nan


def bits(text: str) -> list[float]:
    return [float(digit) for digit in text]


def pearson(a: list[float], b: list[float]) -> float:
    n = len(a)
    ma, mb = sum(a) / n, sum(b) / n
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return cov / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def test_hand_cases() -> None:
    first = ParadoxReport(bits("11110000"), bits("11001100")).summary()
    assert [first[k]["estimate"] for k in ("G", "U_easy", "gap_easy", "correlation_easy")] == [0.5, 0.5, 0.0, 0.0]
    second = ParadoxReport(bits("11110000"), bits("11100000")).summary()
    assert second["gap_easy"]["estimate"] == 0.125
    assert second["correlation_easy"]["estimate"] == pytest.approx(math.sqrt(0.6))
    assert second["items"] == 8
    assert "brittleness" not in second


def test_a_constant_series_has_no_correlation() -> None:
    found = ParadoxReport(bits("1111"), bits("1010")).summary()["correlation_easy"]
    assert math.isnan(found["estimate"])
    assert found["defined"] is False
    # 0.1 three times: the mean is not 0.1 in floating point, and still the series is constant
    found = ParadoxReport([0.1, 0.1, 0.1], bits("100")).summary()["correlation_easy"]
    assert math.isnan(found["estimate"])
    assert ParadoxReport(bits("10"), bits("10")).summary()["correlation_easy"]["undefined"] == pytest.approx(
        0.5, abs=0.1
    )


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 4), min_size=3, max_size=12))
@settings(max_examples=40, deadline=None)
def test_equals_the_loops(rows: list[tuple[float, ...]]) -> None:
    g, easy, hard, q = map(list, zip(*rows, strict=True))
    found = ParadoxReport(g, easy, hard, q, resamples=5).summary()
    n = len(g)
    assert found["G"]["estimate"] == pytest.approx(sum(g) / n)
    assert found["brittleness"]["estimate"] == pytest.approx(sum(easy) / n - sum(hard) / n)
    for name, s in (("easy", easy), ("hard", hard), ("interrogative", q)):
        assert found[f"U_{name}"]["estimate"] == pytest.approx(sum(s) / n)
        assert found[f"gap_{name}"]["estimate"] == pytest.approx(sum(g) / n - sum(s) / n)
        if len(set(g)) > 1 and len(set(s)) > 1:
            assert found[f"correlation_{name}"]["estimate"] == pytest.approx(pearson(g, s))
        else:
            assert not found[f"correlation_{name}"]["defined"]
    right = [b for a, b in zip(g, q, strict=True) if a == 1]
    want = sum(b < 1 for b in right) / len(right) if right else NAN
    assert found["interrogative_error"] == pytest.approx(want, nan_ok=True)


def test_missing_scores() -> None:
    """An unread answer is wrong and counted; an item without generation leaves what needs both."""
    found = ParadoxReport([1, 0, NAN, 1], [1, NAN, 0, 0], interrogative=[0.5, NAN, NAN, 1]).summary()
    assert found["unparseable"] == {"selective_easy": 1}
    assert found["U_easy"]["estimate"] == 0.25
    assert found["G"]["estimate"] == pytest.approx(2 / 3)
    assert found["gap_easy"]["estimate"] == pytest.approx(1 / 3)
    assert found["correlation_easy"]["estimate"] == pytest.approx(pearson([1, 0, 1], [1, 0, 0]))
    assert found["interrogative_error"] == 0.5
    nothing = ParadoxReport([NAN, NAN], [1, 0]).summary()
    assert nothing["gap_easy"] == {"estimate": pytest.approx(NAN, nan_ok=True), "defined": False}


def test_against_people() -> None:
    people = ParadoxReport(bits("11001100"), bits("11011101"), bits("11011100"))
    found = ParadoxReport(bits("11101100"), bits("11001111"), bits("01000101"), human=people).summary()
    assert found["G_minus_human"]["estimate"] == pytest.approx(1 / 8)
    assert found["U_hard_minus_human"]["estimate"] == pytest.approx(-2 / 8)
    assert found["brittleness_minus_human"]["estimate"] == pytest.approx(3 / 8 - 1 / 8)
    own, theirs = (pearson(bits(a), bits(b)) for a, b in (("11101100", "01000101"), ("11001100", "11011100")))
    assert found["correlation_hard_minus_human"]["estimate"] == pytest.approx(own - theirs)
    assert found["hypotheses"] == {"1": True, "2": True, "3": True}
    assert people.summary().keys().isdisjoint({"hypotheses"})
    swapped = ParadoxReport(people.generation, people.selective_easy, human=people).summary()
    assert swapped["hypotheses"] == {"1": False, "2": False, "3": None}


def test_bootstrap_by_hand() -> None:
    """Two items: resamples are 00, 01, 10, 11, so the mean is 0, 0.5 or 1 with odds 1:2:1."""
    found = paired_bootstrap(lambda a: a.mean(-1), [0.0, 1.0], resamples=20_000, level=0.4)
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.p_positive == pytest.approx(0.25, abs=0.02)
    assert found.p_negative == 1.0
    same = paired_bootstrap(lambda a, b: (a - b).mean(-1), [0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert (same.low, same.high, same.p_negative) == (-1.0, -1.0, 0.0)  # items stay together
    assert str(same) == "-1.000 [-1.000, -1.000]"


def test_the_interval_covers_the_true_gap() -> None:
    """In 93 to 97% of 500 simulated sets of 200 items; g and s share half of their items' difficulty."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(500):
        shared = torch.rand(200, generator=generator) < 0.5
        luck = torch.rand(3, 200, generator=generator)
        g = torch.where(shared, luck[0] < 0.7, luck[1] < 0.7).double()
        s = torch.where(shared, luck[0] < 0.5, luck[2] < 0.5).double()
        found = paired_bootstrap(lambda a, b: (a - b).mean(-1), g, s, resamples=500, seed=trial)
        covered += found.low <= 0.2 <= found.high
    assert 0.93 <= covered / 500 <= 0.97


class Fixed:
    """The same logits after every token."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor(logits)

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_selection_on_fixed_logits_is_a_hand_sum() -> None:
    logits = [0.0, 1.0, 2.0]
    log_z = math.log(1 + math.e + math.e**2)
    candidates = [[2, 2, 0], [1], [2, 1]]
    found = select_by_likelihood(Fixed(logits), None, [0, 0], candidates)
    want = [4 / 3 - log_z, 1 - log_z, 1.5 - log_z]
    torch.testing.assert_close(found.scores, torch.tensor(want))
    assert found.selected == 2
    total = select_by_likelihood(Fixed(logits), None, [0, 0], candidates, normalise=False)
    torch.testing.assert_close(total.scores, torch.tensor([4 - 3 * log_z, 1 - log_z, 3 - 2 * log_z]))
    assert total.selected == 1


@pytest.mark.parametrize("bos", [False, True])
def test_selection_on_a_model(bos: bool) -> None:
    """Each token's own log-probability, from growing prefixes."""
    tokenizer, model = tiny_tokenizer(bos), tiny("llama", vocab_size=500)
    context, candidates = "The value of", [" the object", " a name that is bound"]
    found = select_by_likelihood(model, tokenizer, context, candidates)
    for candidate, score in zip(candidates, found.scores, strict=True):
        ids = tokenizer(context)["input_ids"]
        assert (ids[0] == 0) is bos
        logs = []
        for token in tokenizer(candidate, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                logs.append(float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]))
            ids.append(token)
        assert float(score) == pytest.approx(sum(logs) / len(logs), abs=1e-5)


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1), (" c.", 2), ("(d)", 3), ("Answer: A.", 0), ("I think it is B", 1), ("A cat", None), ("", None),
        ("A or B", None), ("B. Paris, so B", 1), ("E", None), ("because", None), ("?", None),
    ],
)  # fmt: skip
def test_letters(answer: str, index: int | None) -> None:
    assert read_letter(answer, 4) == index


def item(i: int, hardness: str, **fields) -> ParadoxItem:
    wrong = ["x", "y", "z"] if hardness == "easy" else ["r1", "r2", "r3"]
    return ParadoxItem(str(i), "d" + str(i % 2), "in", "r", shuffled("r", wrong, i), hardness, i, **fields)


def test_records(tmp_path) -> None:
    """Written, read, and reported by domain; the order of candidates is the seed's."""
    items = []
    for i in range(6):
        for hardness in ("easy", "hard"):
            right = shuffled("r", ["x", "y", "z"], i).index("r")
            selected = right if i % 3 else None if hardness == "hard" else (right + 1) % 4
            scores = {"answer_scores": (1.0, 0.0), "questions": ("a?", "b?"), "answers": ("1", "2")} if i else {}
            items.append(item(i, hardness, generation="g", generation_score=i / 5, selected=selected, **scores))
    write_records(tmp_path / "records.jsonl", items)
    read = read_records(tmp_path / "records.jsonl")
    assert read == items
    assert len({candidates.index("r") for candidates in (i.candidates for i in items)}) > 1
    reports = by_domain(read, resamples=10)
    assert list(reports) == ["d0", "d1"]
    found = reports["d1"].summary()
    assert found["G"]["estimate"] == pytest.approx((1 + 3 + 5) / 15)
    assert found["U_easy"]["estimate"] == pytest.approx(2 / 3)
    assert found["unparseable"] == {"selective_easy": 0, "selective_hard": 1}
    whole = ParadoxReport.from_items(items)
    assert torch.isnan(torch.as_tensor(whole.interrogative)).tolist() == [True] + [False] * 5


def test_refuses(tmp_path) -> None:
    with pytest.raises(ArgumentError, match="selective_easy: expected 3 scores, at least one, got"):
        ParadoxReport([1, 0, 1], [1, 0])
    with pytest.raises(ArgumentError, match="generation: expected scores from 0 to 1, got 0 to 2"):
        ParadoxReport([2, 0], [1, 0])
    with pytest.raises(ArgumentError, match="human: expected scores of the same 2 items, got 3"):
        ParadoxReport([1, 0], [1, 0], human=ParadoxReport([1, 0, 1], [1, 0, 1]))
    with pytest.raises(ArgumentError, match="each id once as easy"):
        ParadoxReport.from_items([item(0, "easy"), item(1, "hard")])
    with pytest.raises(ArgumentError, match="each id once as easy"):
        ParadoxReport.from_items([item(0, "easy"), item(0, "easy")])
    with pytest.raises(ArgumentError, match="candidates of item 'a' must hold the reference once"):
        ParadoxItem("a", "d", "in", "r", ("x", "y"), "easy")
    with pytest.raises(ArgumentError, match=r"selected must be one of 0..3 or None, got 4"):
        item(0, "easy", selected=4)
    with pytest.raises(ArgumentError, match="hardness must be"):
        ParadoxItem("a", "d", "in", "r", ("r", "y"), "medium")
    with pytest.raises(ArgumentError, match="context and candidates: expected tokens in all"):
        select_by_likelihood(Fixed([0.0]), None, [0], [[0], []])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "a"}) + "\n")
    with pytest.raises(ArgumentError, match=r"path: line 1 of .* is no record: expected the fields"):
        read_records(tmp_path / "bad.jsonl")
    for arguments in ([], [[1.0], [1.0, 2.0]], [[]]):
        with pytest.raises(ArgumentError, match="series: expected equally many items"):
            paired_bootstrap(lambda *a: a[0].mean(-1), *arguments)
    with pytest.raises(ArgumentError, match="resamples must be at least 1"):
        paired_bootstrap(lambda a: a.mean(-1), [1.0], resamples=0)
