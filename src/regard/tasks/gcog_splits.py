"""The splits of gCOG: what to train on, and what to ask afterwards."""

from dataclasses import replace
from typing import Literal, NamedTuple

from regard.errors import ArgumentError
from regard.tasks.gcog import GCog


class Generalisation(NamedTuple):
    """What to train on, by turns, and what to test on, by name."""

    train: tuple[GCog, ...]
    test: dict[str, GCog]


def generalisation(
    name: Literal["distractors", "operators", "trees", "productivity"], n_features: int = 0, seed: int = 0
) -> Generalisation:
    """The paper's splits; train and test draw from different seeds.

    - distractors: up to 5 in training, 10, 20, 30 and 40 afterwards;
    - operators: operators of depth 1 on features they were not trained with;
    - trees: statements of depth 3 with ends they were not trained with;
    - productivity: depths 1 and 3 in training, 5 and 7 afterwards.

    Raises:
        ArgumentError: no such split.
    """
    base = GCog(n_distractors=(0, 5), n_features=n_features, seed=2 * seed)
    train: tuple[GCog, ...]
    tests: dict[str, GCog]
    if name == "distractors":
        train, tests = (base,), {f"{n} distractors": replace(base, n_distractors=n) for n in (5, 10, 20, 30, 40)}
    elif name == "operators":
        train = (replace(base, split="operators"),)
        tests = {"trained pairs": train[0], "crossed pairs": replace(train[0], subset=2)}
    elif name == "trees":
        train = (replace(base, depth=3, split="trees"),)
        tests = {"trained pairs": train[0], "crossed pairs": replace(train[0], subset=2)}
    elif name == "productivity":
        train = (base, replace(base, depth=3))
        tests = {f"depth {depth}": replace(base, depth=depth) for depth in (1, 3, 5, 7)}
    else:
        raise ArgumentError(f"name: expected distractors, operators, trees or productivity, got {name!r}")
    return Generalisation(train, {key: replace(task, seed=2 * seed + 1) for key, task in tests.items()})
