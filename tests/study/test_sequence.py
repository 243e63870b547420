import json

import pytest

from regard.cli.main import main
from regard.errors import ArgumentError
from regard.study import sequence as study
from regard.study.sequence import Cell, Settings, all_mixers, is_causal, run_sequence
from regard.study.sequence_page import markdown, page
from regard.tasks.sequence import AssociativeRecall

TASKS = [AssociativeRecall(2, 3, 2)]
TINY = Settings(steps=2, tokens=32, dim=16, depth=1, num_heads=2)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(study, "COST_LENGTH", 8)
    monkeypatch.setattr(study, "_REPEATS", 1)


def test_finished_cells_are_kept_and_failures_are_rows(tmp_path, monkeypatch, capfd):
    seen = []
    train = study._train

    def sometimes(mixer, task, settings, report):
        if mixer == "aaren":
            raise ArithmeticError("the loss is <nan>")
        return train(mixer, task, settings, report)

    monkeypatch.setattr(study, "_train", sometimes)
    first = run_sequence(["softmax", "aaren"], TINY, tmp_path, TASKS, lambda *at: seen.append(at))
    assert seen == [("softmax", "recall", 1, 2), ("softmax", "recall", 2, 2)]
    assert "Traceback" in capfd.readouterr().err
    score, cost, bad, _ = first
    assert 0 <= score.numbers["score"] <= 1
    assert cost.numbers["parameters"] > 4 * 16**2
    assert cost.numbers["state"] == 2 * 16 * 4  # keys and values of one layer in float32
    assert bad.error == "ArithmeticError: the loss is <nan>"
    text, html = markdown(first, TINY, TASKS), page(first, TINY, TASKS)
    assert "| aaren | failed |" in text
    assert "aaren, recall: ArithmeticError" in text
    assert "<nan>" not in html
    assert "&lt;nan&gt;" in html

    monkeypatch.setattr(study, "_train", train)
    second = run_sequence(["softmax", "aaren"], TINY, tmp_path, TASKS, lambda *at: seen.append(at))
    assert second[:2] == first[:2]
    assert second[2].error is None  # what failed is tried again
    assert len(seen) == 4
    with pytest.raises(ArgumentError, match="other settings"):
        run_sequence(["softmax"], Settings(steps=3), tmp_path, TASKS)


def test_noncausal_mechanisms_only_classify(tmp_path):
    assert [cell.task for cell in run_sequence(["l2vit"], TINY, tmp_path, TASKS)] == ["cost"]


def test_training_learns(tmp_path):
    settings = Settings(steps=60, tokens=64, dim=16, depth=1, num_heads=2, lr=1e-2)
    cell, _ = run_sequence(["softmax"], settings, tmp_path, [AssociativeRecall(1, 1, 2)])
    assert cell.numbers["score"] > 0.9


def test_every_mechanism_is_in_the_study_or_left_out_for_a_reason():
    mixers = all_mixers()
    assert mixers[0] == "softmax"
    assert set(study.CONFIGS) <= {*mixers}
    assert not set(study.LEFT_OUT) & {*mixers}
    causal = {mixer for mixer in mixers if is_causal(mixer)}
    assert {"softmax", "lightning-attention", "titans"} <= causal
    assert not {"l2vit", "hyper-attention"} & causal


def test_colours_and_missing_cells():
    cells = [
        Cell("softmax", "recall", {"score": 1.0, "seconds": 1.0}),
        Cell("aaren", "recall", {"score": 0.0, "seconds": 1.0}),
        Cell("l2vit", "cost", {"parameters": 10.0, "forward": 0.5}),
    ]
    text = page(cells, TINY, TASKS)
    assert "--share:1.00" in text
    assert "--share:0.00" in text
    assert "| l2vit | – | 10 | – | 0.50 | – | – |" in markdown(cells, TINY, TASKS)


def test_the_command_writes_table_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TASKS", tuple(TASKS))
    out = tmp_path / "results"
    with pytest.raises(SystemExit, match="0"):
        main(["study", "sequence", "--mixers", "softmax", "--steps", "1", "--out", str(out)])
    assert "| softmax |" in capsys.readouterr().out
    assert (out / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((out / "settings.json").read_text())["steps"] == 1
    with pytest.raises(SystemExit, match="2"):
        main(["study", "sequence", "--mixers", "nothing", "--out", str(out)])
