import json

import pytest

from regard.errors import ArgumentError
from regard.study.sequence import Settings, causal_mixers, markdown, run_sequence
from regard.tasks.sequence import AssociativeRecall

TASKS = [AssociativeRecall(2, 3, 2)]


def test_finished_cells_are_kept_and_failures_are_rows(tmp_path):
    settings, store, seen = Settings(steps=2, batch_size=4, dim=16, depth=1, num_heads=2), tmp_path / "s.json", []
    first = run_sequence(["softmax", "nothing"], settings, store, TASKS, lambda *at: seen.append(at))
    assert seen == [("softmax", "recall", 1, 2), ("softmax", "recall", 2, 2)]
    good, bad = first
    assert good.error is None
    assert 0 <= good.score <= 1
    assert good.state_bytes == 2 * 16 * 4  # keys and values of one layer in float32
    assert "nothing" in bad.error
    assert "failed: " in markdown(first, settings)
    assert run_sequence(["softmax", "nothing"], settings, store, TASKS, lambda *at: seen.append(at)) == first
    assert len(seen) == 2
    assert len(json.loads(store.read_text())["cells"]) == 2
    with pytest.raises(ArgumentError, match="other settings"):
        run_sequence(["softmax"], Settings(steps=3), store, TASKS)


def test_training_learns(tmp_path):
    settings = Settings(steps=60, batch_size=16, dim=16, depth=1, num_heads=2, lr=1e-2)
    (cell,) = run_sequence(["softmax"], settings, tmp_path / "s.json", [AssociativeRecall(1, 1, 2)])
    assert cell.score > 0.9


def test_default_mixers_are_causal():
    assert causal_mixers()[0] == "softmax"
    assert "lama" not in causal_mixers()
