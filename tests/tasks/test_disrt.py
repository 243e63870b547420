"""DiSRT: which is odd, trials, intervals, and stimuli that go through files."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regard.errors import ArgumentError, ShapeError
from regard.tasks.disrt import DiSRT, best, binomial_interval, layer_features, local_statistics, oddity
from regard.tasks.disrt_stimuli import read_stimuli, stimulus_quality, write_stimuli
from regard.tasks.shapes import shape_pictures
from regard.tasks.texture import RandomFilters


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_of_two_equal_vectors_and_an_orthogonal_one_that_is_odd() -> None:
    same, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    for at in range(3):
        trial = [2 * same, same, 5 * same]
        trial[at] = other
        assert oddity(torch.stack(trial)[None]).tolist() == [at]


@settings(max_examples=25, deadline=None)
@given(trials=st.integers(1, 6), width=st.integers(2, 5), seed=st.integers(0, 1000))
def test_oddity_equals_its_definition(trials, width, seed) -> None:
    x = torch.randn(trials, 3, width, dtype=torch.float64, generator=seeded(seed))
    for trial, found in zip(x, oddity(x, seed).tolist(), strict=True):
        unit = [v / v.norm() for v in trial]
        totals = [sum(float(unit[a] @ unit[b]) for b in range(3) if b != a) for a in range(3)]
        assert found == min(range(3), key=totals.__getitem__)


def test_ties_are_drawn() -> None:
    x = torch.ones(3000, 3, 4)
    found = oddity(x, 1)
    counts = found.bincount(minlength=3)
    assert (counts > 900).all()
    assert torch.equal(oddity(x, 1), found)
    assert not torch.equal(oddity(x, 2), found)
    # the last two are alike and the first is in between: 0 and 1 would win by rounding, never by place
    pair = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]).expand(2000, 3, 2)
    assert oddity(pair).bincount(minlength=3)[2] == 0


def test_intervals_are_wilsons() -> None:
    found = binomial_interval(8, 10)
    assert (found.accuracy, found.trials) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    # both ends are where the normal test of the true share just fails
    for end in (found.low, found.high):
        assert abs(0.8 - end) == pytest.approx(1.959964 * (end * (1 - end) / 10) ** 0.5)
    assert binomial_interval(0, 5).low == pytest.approx(0)
    assert binomial_interval(5, 5).high == pytest.approx(1)
    assert str(found) == "80% (49%–94%)"
    for hits, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ArgumentError, match="hits and trials"):
            binomial_interval(hits, trials)


def triples(count: int = 12) -> torch.Tensor:
    """Smooth pictures, each beside two in which the same pixels stand elsewhere."""
    rows = torch.linspace(0, 1, 8)[:, None].expand(8, 8) * torch.rand(count, 1, 1, generator=seeded())
    flat = rows.flatten(1)
    moved = [flat[:, torch.randperm(64, generator=seeded(i + 1))].unflatten(1, (8, 8)) for i in range(2)]
    return torch.stack([rows, *moved], 1)[:, :, None]


def test_trials_tell_arrangement_from_statistics() -> None:
    trials = DiSRT(triples(400))
    net = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.ReLU())
    with torch.no_grad():  # steps to the right, steps down, and the mean
        steps = [[[-1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]], [[0.25, 0.25], [0.25, 0.25]]]
        net[0].weight.copy_(torch.tensor(steps)[:, None])
    seen = []
    found = trials.evaluate(layer_features(net), ["0", "1"], on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (400, 400)
    assert set(found) == {"0", "1"}
    assert found["1"].low > 0.95
    assert best(found) == max(found, key=lambda name: found[name].accuracy)
    # pixels that only moved have equal statistics, so rounding decides: 1/3
    bag = trials.evaluate(lambda x, names: {names[0]: local_statistics(x.double()).float()}, ["bag"])["bag"]
    assert bag.low < 1 / 3 + 0.05
    assert bag.accuracy < 0.45


def test_accuracy_counts_trials() -> None:
    """Features that say nothing but which picture of the trial it is."""
    trials = DiSRT(torch.zeros(5, 3, 1, 4, 4))

    def features(x: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
        n = len(x) // 3
        alone = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        return {"right": alone.repeat(n, 1), "wrong": alone.flip(0).repeat(n, 1)}

    found = trials.evaluate(features, ["right", "wrong"], batch_size=2)
    assert (found["right"].accuracy, found["wrong"].accuracy) == (1, 0)
    assert found["right"].trials == 5
    assert best(found) == "right"


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(torch.cat([torch.full((len(x), 1, x.shape[1]), 7.0), x.flatten(2).mT], 1))


def test_pooling() -> None:
    x = torch.rand(3, 2, 4, 4, generator=seeded())
    model = Tokens()
    flat = x.flatten(2).mT
    pools = {pool: layer_features(model, pool)(x, ["block"])["block"] for pool in ("mean", "cls", "all")}
    torch.testing.assert_close(pools["mean"], flat.mean(1))
    assert torch.equal(pools["cls"], torch.full((3, 2), 7.0))
    assert torch.equal(pools["all"], flat.flatten(1))
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    torch.testing.assert_close(layer_features(net)(x, ["0"])["0"], flat.mean(1))
    assert torch.equal(layer_features(net)(x, ["1"])["1"], x.flatten(1))
    with pytest.raises(ArgumentError, match="has no class token"):
        layer_features(net, "cls")(x, ["0"])
    with pytest.raises(ArgumentError, match="pool: expected 'mean', 'cls' or 'all', got 'max'"):
        layer_features(net, "max")


@pytest.mark.parametrize("patch", [1, 2])
def test_local_statistics_equal_loops(patch) -> None:
    x = torch.rand(1, 2, 4, 5, dtype=torch.float64, generator=seeded())
    rows, columns = 4 - patch + 1, 5 - patch + 1
    pieces = [x[0, :, r : r + patch, c : c + patch].flatten() for r in range(rows) for c in range(columns)]
    mean = sum(pieces) / len(pieces)
    covariance = sum(torch.outer(p - mean, p - mean) for p in pieces) / len(pieces)
    size = len(mean)
    want = [*mean.tolist(), *(covariance[i, j].item() for i in range(size) for j in range(i, size))]
    assert local_statistics(x, patch)[0].tolist() == pytest.approx(want)


def test_stimuli_go_through_files(tmp_path) -> None:
    pictures = shape_pictures(2, 12, generator=seeded()).images
    filters = RandomFilters(1, 4, (3,))
    named = {"first": pictures[0], "second": pictures[1].expand(3, -1, -1).mean(0, keepdim=True)}
    seen = []
    arguments = (filters, filters.layers, "random-filter Gram matching", 5, (3, 8))
    path = write_stimuli(tmp_path, named, *arguments, on_progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    assert {p.name for p in (tmp_path / "first").iterdir()} == {"orig.png", "syn_3.png", "syn_8.png"}
    manifest = json.loads(path.read_text())
    assert manifest["synthesis"] == "random-filter Gram matching"
    assert (manifest["iterations"], manifest["seeds"], manifest["layers"]) == (5, [3, 8], list(filters.layers))
    assert [entry["id"] for entry in manifest["pictures"]] == ["first", "second"]
    assert all(len(entry["final_loss"]) == 2 for entry in manifest["pictures"])
    triples = read_stimuli(tmp_path)
    assert triples.shape == (2, 3, 1, 12, 12)
    torch.testing.assert_close(triples[:, 0], pictures, atol=0.51 / 255, rtol=0)
    assert torch.equal(DiSRT(path).triples, triples)
    # what is there is not made again, what is new is added
    stamp = (tmp_path / "first" / "syn_3.png").stat().st_mtime_ns
    write_stimuli(tmp_path, {**named, "third": pictures[0]}, *arguments)
    assert (tmp_path / "first" / "syn_3.png").stat().st_mtime_ns == stamp
    assert len(read_stimuli(path)) == 3
    with pytest.raises(ArgumentError, match="was made with other arguments"):
        write_stimuli(tmp_path, named, filters, filters.layers, "random-filter Gram matching", 6, (3, 8))
    with pytest.raises(ArgumentError, match="seeds: expected two that differ"):
        write_stimuli(tmp_path, named, filters, filters.layers, "x", seeds=(1, 1))
    with pytest.raises(ArgumentError, match="ids that are file names"):
        write_stimuli(tmp_path, {"../up": pictures[0]}, filters, filters.layers, "x")
    with pytest.raises(ArgumentError, match="there is no manifest"):
        DiSRT(tmp_path / "nowhere")


def test_colours_survive_files(tmp_path) -> None:
    picture = torch.rand(3, 8, 8, generator=seeded())
    filters = RandomFilters(3, 2, (3,))
    write_stimuli(tmp_path, {"a": picture}, filters, filters.layers, "x", 1)
    torch.testing.assert_close(read_stimuli(tmp_path)[0, 0], picture, atol=0.51 / 255, rtol=0)


def test_quality_tells_a_copy_from_a_synthesis_from_another_picture() -> None:
    pictures = shape_pictures(4, 16, generator=seeded()).images
    filters = RandomFilters(1, 4, (3,))
    turned, other = pictures.flip(-1), pictures.roll(1, 0)
    found = stimulus_quality(torch.stack([pictures, pictures, other], 1), filters, filters.layers)
    assert found.gram[:, 0].max() < 1e-6
    torch.testing.assert_close(found.correlation[:, 0], torch.ones(4, dtype=torch.float64))
    assert found.gram[:, 1].min() > 0.01
    assert not found.valid().any()
    flat = torch.stack([pictures[0].flatten(), turned[0].flatten()]).double()
    got = stimulus_quality(torch.stack([pictures, turned, turned], 1), filters, filters.layers).correlation[0, 0]
    assert got.item() == pytest.approx(torch.corrcoef(flat)[0, 1].item())
    assert type(found)(torch.tensor([[0.005, 0.009]]), torch.tensor([[0.1, -0.9]])).valid().all()
    with pytest.raises(ShapeError, match="T at least 2"):
        stimulus_quality(torch.zeros(1, 3, 1, 8, 8), filters, filters.layers)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"stimuli: expected \(T, 3, C, H, W\), got \(4, 2, 1, 8, 8\)"):
        DiSRT(torch.zeros(4, 2, 1, 8, 8))
    with pytest.raises(ShapeError, match=r"features: expected \(T, 3, D\)"):
        oddity(torch.zeros(4, 2, 5))
    with pytest.raises(ShapeError, match=r"feature_fn: expected \(6, D\) of 'a', got \(6, 1, 8, 8\)"):
        DiSRT(torch.zeros(2, 3, 1, 8, 8)).evaluate(lambda x, names: {"a": x}, ["a"])
