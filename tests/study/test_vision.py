import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from regard import catalog
from regard.cli.main import main
from regard.errors import ArgumentError
from regard.models.vision.backbone import Backbone
from regard.study import vision as study
from regard.study.cells import Cell
from regard.study.vision import BUDGET, SHRUNK, Settings, all_backbones, megamacs, network, run_vision
from regard.study.vision_page import markdown, page
from regard.tasks.images import ImageBatch
from regard.tasks.sequence import generator


@dataclass(frozen=True)
class Sides:
    """Which half is bright."""

    size: int = 64
    test_size: int = 5
    name: ClassVar[str] = "sides"
    metric: ClassVar[str] = "top-1"
    num_classes: ClassVar[int] = 2

    def batch(self, split, index, batch_size, seed=0):
        g = generator(split, index, seed)
        targets = torch.randint(2, (batch_size,), generator=g)
        images = torch.randn(batch_size, 1, self.size, self.size, generator=g)
        images[targets == 1, :, :, self.size // 2 :] += 2
        images[targets == 0, :, :, : self.size // 2] += 2
        return ImageBatch(images, targets)


TASKS = [Sides()]
TINY = Settings(steps=2, batch_size=4)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(study, "_REPEATS", 1)


@pytest.mark.parametrize("name", SHRUNK)
def test_every_backbone_has_the_same_budget(name):
    assert megamacs(name) == pytest.approx(BUDGET, rel=0.1)


def test_every_backbone_is_in_the_study():
    found = set(study.BASELINES)
    for system in catalog.systems(status="works"):
        for part in (None, *system.parts):
            cls = system.load(part)
            if isinstance(cls, type) and issubclass(cls, Backbone):
                found.add(system.slug if part is None else f"{system.slug}/{part}")
    assert found - set(study.LEFT_OUT) == set(SHRUNK) == {*all_backbones()}


def test_networks_are_for_grey_images_and_any_classes():
    model = network("vit", 3)
    assert (model.in_chans, model.num_classes) == (1, 3)
    with pytest.raises(ArgumentError, match="'resnet'"):
        network("resnet", 3)


def test_finished_cells_are_kept_and_failures_are_rows(tmp_path, monkeypatch, capfd):
    seen = []
    train = study._train

    def sometimes(name, task, settings, report):
        if name == "cnn":
            raise ArithmeticError("the loss is <nan>")
        return train(name, task, settings, report)

    monkeypatch.setattr(study, "_train", sometimes)
    first = run_vision(["vit", "cnn"], TINY, tmp_path, TASKS, lambda *at: seen.append(at))
    assert seen == [("vit", "sides", 1, 2), ("vit", "sides", 2, 2)]
    assert "Traceback" in capfd.readouterr().err
    score, cost, bad, _ = first
    assert {"score", "score@48", "score@96", "loss", "seconds"} == set(score.numbers)
    assert score.numbers["score"] * 5 == pytest.approx(round(score.numbers["score"] * 5))  # of five test images
    assert cost.numbers["parameters"] == sum(p.numel() for p in network("vit", 10).parameters())
    assert cost.numbers["megamacs"] == megamacs("vit")
    assert bad.error == "ArithmeticError: the loss is <nan>"
    text, html = markdown(first, TINY, TASKS), page(first, TINY, TASKS)
    assert "| cnn | failed | – | – | – |" in text
    assert "cnn, sides: ArithmeticError" in text
    assert "guessing gives: sides 0.5" in text
    assert "<nan>" not in html

    monkeypatch.setattr(study, "_train", train)
    second = run_vision(["vit", "cnn"], TINY, tmp_path, TASKS, lambda *at: seen.append(at))
    assert second[:2] == first[:2]
    assert second[2].error is None  # what failed is tried again
    assert len(seen) == 4
    with pytest.raises(ArgumentError, match="other settings"):
        run_vision(["vit"], Settings(steps=3), tmp_path, TASKS)


def test_a_size_that_is_refused_says_why(tmp_path):
    cell, _ = run_vision(["gc-vit"], TINY, tmp_path, TASKS)
    assert "score" in cell.numbers
    assert set(cell.remarks) == {"score@48", "score@96"}
    text = markdown([cell], TINY, TASKS)
    assert "| refused | refused |" in text
    assert f"gc-vit at 48 – {cell.remarks['score@48']}" in text


def test_what_can_be_resized_is(tmp_path):
    cell, _ = run_vision(["spectformer"], TINY, tmp_path, TASKS)
    assert {"score", "score@48", "score@96"} <= set(cell.numbers)
    assert not cell.remarks


def test_training_learns(tmp_path):
    cell, _ = run_vision(["cnn"], Settings(steps=12, batch_size=8), tmp_path, [Sides(test_size=32)])
    assert cell.numbers["score"] > 0.9
    assert cell.numbers["score@96"] > 0.9


def test_colours_and_missing_cells():
    numbers = {"score": 1.0, "score@48": 0.5, "score@96": 0.25}
    cells = [
        Cell("vit", "sides", numbers),
        Cell("cnn", "sides", {**numbers, "score": 0.0}),
        Cell("maxvit", "cost", {"parameters": 10.0, "forward": 0.5}),
    ]
    text = page(cells, TINY, TASKS)
    assert "--share:1.00" in text
    assert "--share:0.00" in text
    assert "| maxvit | – | – | – | – | 10 | – | 0.50 | – |" in markdown(cells, TINY, TASKS)
    assert "| vit | 1.000 | 1.000 | 0.500 | 0.250 |" in markdown(cells, TINY, TASKS)


def test_the_command_writes_table_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TASKS", tuple(TASKS))
    out = tmp_path / "results"
    with pytest.raises(SystemExit, match="0"):
        main(["study", "vision", "--backbones", "vit", "--steps", "1", "--out", str(out)])
    assert "| vit |" in capsys.readouterr().out
    assert (out / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((out / "settings.json").read_text())["steps"] == 1
    with pytest.raises(SystemExit, match="2"):
        main(["study", "vision", "--backbones", "nothing", "--out", str(out)])
