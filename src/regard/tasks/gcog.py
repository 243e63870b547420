"""gCOG: questions about a scene as programs of operators, with exact splits for three kinds of generalisation."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.gcog_program import (
    CELLS,
    COLOURS,
    GRID,
    OPERATORS,
    PARITY,
    SHAPES,
    Node,
    children,
    colour_class,
    encode_rule,
    is_even,
    location_class,
    scene_rows,
    shape_class,
)

Split = Literal["operators", "trees"]
STARTS = ("exist", *PARITY)
ENDS = OPERATORS[:-1]
#: operators on features, by the split of programs of depth 1; starts and ends, by that of deeper ones
OPERATOR_SETS = (("exist", "sumeven", "producteven", "getshape"), ("sumodd", "productodd", "go", "getcolor"))
START_SETS = (("exist", "sumeven", "producteven"), ("sumodd", "productodd"))
END_SETS = (("sumeven", "producteven", "getcolor", "getshape"), ("exist", "sumodd", "productodd", "go"))
Scene = dict[tuple[int, int], tuple[int, int]]  # (y, x) to (shape, colour)
_TRIES = 1000


class Trial(NamedTuple):
    """rule (N, 8), stim (101, 3) and the class of the answer; see `regard.tasks.gcog_program`."""

    rule: Tensor
    stim: Tensor
    target: int


class GCogBatch(NamedTuple):
    """rule (B, N, 8), filled up with rows of zeros at the end, stim (B, 101, 3), target (B,)."""

    rule: Tensor
    stim: Tensor
    target: Tensor


@dataclass(frozen=True)
class GCog:
    """Programs on scenes (gCOG, arXiv:2401.15030): iterate, or take a `batch`.

        depth 1    one operator
        depth 3    statement, switch, an end if it is true, an end if it is false
        depth 5    the ends are such programs themselves, and so on

    A scene is a 10 × 10 grid of objects (shape, colour). Every operator's answer is drawn first (true and false are
    equally frequent), the objects of the whole tree are placed so that it is right, and then distractors, which no
    selector can mean. So both branches of a switch could be answered, and only one is asked for.

    Args:
        depth: 1, 3, 5, ...
        n_distractors: how many, or (fewest, most).
        split: "operators" (depth 1: four operators go with colours of the first half, four with shapes of the second
            half) or "trees" (statements of one kind go with ends of the same kind); None for all programs.
        subset: 1 for the pairs of a split to train on, 2 for the crossed ones, none of which is in 1.
        n_features: colours and shapes, the first so many of each; 0 for all 10 and 26.
        seed: of everything that is drawn.

    Raises:
        ArgumentError: there is no such program, or no room for it.
    """

    depth: int = 1
    n_distractors: int | tuple[int, int] = 0
    split: Split | None = None
    subset: Literal[1, 2] = 1
    n_features: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depth < 1 or self.depth % 2 == 0:
            raise ArgumentError(f"depth: expected an odd number from 1, got {self.depth}")
        if self.split not in (None, "operators", "trees"):
            raise ArgumentError(f"split: expected 'operators', 'trees' or None, got {self.split!r}")
        if (self.split == "operators" and self.depth > 1) or (self.split == "trees" and self.depth == 1):
            raise ArgumentError(f"split: {self.split!r} does not split programs of depth {self.depth}")
        if self.subset not in (1, 2):
            raise ArgumentError(f"subset: expected 1 or 2, got {self.subset!r}")
        if self.n_features and not 2 <= self.n_features <= len(COLOURS):
            raise ArgumentError(f"n_features: expected 0 or 2 to {len(COLOURS)}, got {self.n_features}")
        low, high = self._distractors
        if not 0 <= low <= high or high > CELLS // 2:
            raise ArgumentError(f"n_distractors: expected 0 to {CELLS // 2}, got {self.n_distractors}")
        if self.depth > 9:
            raise ArgumentError(f"depth: a scene has no room for programs deeper than 9, got {self.depth}")

    @property
    def _distractors(self) -> tuple[int, int]:
        return (self.n_distractors,) * 2 if isinstance(self.n_distractors, int) else self.n_distractors

    def __iter__(self) -> Iterator[Trial]:
        """Trials without end, the same each time."""
        index = 0
        while True:
            yield self.trial(index)
            index += 1

    def trial(self, index: int) -> Trial:
        """Number ``index`` of them."""
        rng = random.Random(f"{self.seed} {index}")
        for _ in range(_TRIES):  # operators that leave no unambiguous objects are drawn anew, as published
            nodes = self._select(self._operators(rng), rng)
            if nodes is not None:
                return self._scene(nodes, rng)
        raise ArgumentError(f"depth, n_features: no unambiguous program of depth {self.depth} was found in {self}")

    def batch(self, index: int, batch_size: int) -> GCogBatch:
        """Trials ``index · batch_size`` and those after it."""
        return collate([self.trial(index * batch_size + i) for i in range(batch_size)])

    # --- the program ----------------------------------------------------------------------------------------------

    def _operators(self, rng: random.Random) -> list[str]:
        """In breadth order."""
        if self.depth == 1:
            return [rng.choice(ENDS)]
        starts: Sequence[str] = STARTS
        ends: Sequence[str] = ENDS
        if self.split == "trees":
            kind = rng.randrange(2)
            starts, ends = START_SETS[kind], END_SETS[kind if self.subset == 1 else 1 - kind]
        found = []
        for level in range(self.depth // 2):
            found += [rng.choice(starts) for _ in range(2**level)] + ["switch"] * 2**level
        return found + [rng.choice(ends) for _ in range(2 ** (self.depth // 2))]

    def _select(self, operators: list[str], rng: random.Random) -> list[Node] | None:
        """The operators with objects that none of the others can mean; None if the features do not suffice."""
        shapes, colours = self._features
        wanted = [0 if op == "switch" else rng.choice((1, 2)) if op in PARITY else 1 for op in operators]
        if self.depth == 1:
            of_first = operators[0] in OPERATOR_SETS[0]
            pairs = _pairs(len(shapes), len(colours), of_first if self.split else None, self.subset)
            return [Node(operators[0], (rng.choice(pairs),))]
        by_shape, by_colour = operators.count("getcolor"), operators.count("getshape")
        if by_shape >= len(shapes) or by_colour >= len(colours):
            return None
        # a shape whose colour is asked for is the shape of nothing else, and a colour whose shape is asked for likewise
        own_shapes, own_colours = rng.sample(shapes, by_shape), rng.sample(colours, by_colour)
        shapes = [one for one in shapes if one not in own_shapes]
        colours = [one for one in colours if one not in own_colours]
        others = [(shape, colour) for shape in shapes for colour in colours]
        needed = sum(wanted) - by_shape - by_colour
        if needed >= len(others):  # and one is left for the distractors
            return None
        rest = iter(rng.sample(others, needed))
        nodes = []
        for op, count in zip(operators, wanted, strict=True):
            if op == "getcolor":
                nodes.append(Node(op, ((own_shapes.pop(), rng.choice(colours)),)))
            elif op == "getshape":
                nodes.append(Node(op, ((rng.choice(shapes), own_colours.pop()),)))
            else:
                nodes.append(Node(op, tuple(next(rest) for _ in range(count))))
        return nodes

    @property
    def _features(self) -> tuple[list[int], list[int]]:
        return list(range(self.n_features or len(SHAPES))), list(range(self.n_features or len(COLOURS)))

    # --- the scene ------------------------------------------------------------------------------------------------

    def _scene(self, nodes: list[Node], rng: random.Random) -> Trial:
        objects: Scene = {}
        answers = [_place(node, objects, rng) for node in nodes]
        at, below = 0, children(nodes)
        while below[at]:
            at = below[below[at][0]][0 if answers[at] == 0 else 1]
        self._distract(nodes, objects, rng)
        rule = torch.from_numpy(np.array(encode_rule(nodes), np.float32))
        return Trial(rule, scene_rows(objects), answers[at])

    def _distract(self, nodes: list[Node], objects: Scene, rng: random.Random) -> None:
        """Objects that no selector means, whatever it leaves open."""
        shapes, colours = self._features
        asked = {one for node in nodes for one in node.objects}
        own_shapes = {node.objects[0][0] for node in nodes if node.operator == "getcolor"}
        own_colours = {node.objects[0][1] for node in nodes if node.operator == "getshape"}
        shapes = [one for one in shapes if one not in own_shapes]
        colours = [one for one in colours if one not in own_colours]
        wanted = rng.randint(*self._distractors)
        while wanted:
            one = rng.choice(shapes), rng.choice(colours)
            if one not in asked:
                objects[_free_cells(1, objects, rng)[0]] = one
                wanted -= 1


@cache
def _pairs(shapes: int, colours: int, of_first: bool | None, subset: int) -> list[tuple[int, int]]:
    """(shape, colour) that an operator of the first set, the second or (None) any may go with at depth 1."""
    pairs = {(shape, colour) for shape in range(shapes) for colour in range(colours)}
    if of_first is None:
        return sorted(pairs)
    first, second = {p for p in pairs if p[1] < round(colours / 2)}, {p for p in pairs if p[0] >= round(shapes / 2)}
    own, other = (first, second) if of_first else (second, first)
    return sorted(own if subset == 1 else other - own)


def _free_cells(count: int, objects: Scene, rng: random.Random) -> list[tuple[int, int]]:
    """Distinct cells on which nothing stands."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        cell = divmod(rng.randrange(CELLS), GRID)
        if cell not in objects and cell not in found:
            found.append(cell)
    return found


def _place(node: Node, objects: Scene, rng: random.Random) -> int:
    """Put the node's objects on free cells so that its answer is one that was drawn before; returns the answer."""
    if node.operator == "switch":
        return -1
    true = rng.random() < 0.5
    if node.operator == "exist" and not true:
        return 1
    even = true == node.operator.endswith("even")
    cells = _free_cells(len(node.objects), objects, rng)
    while node.operator in PARITY and is_even(node.operator, cells) != even:
        cells = _free_cells(len(node.objects), objects, rng)
    objects |= zip(cells, node.objects, strict=True)
    if node.operator == "go":
        return location_class(*cells[0])
    shape, colour = node.objects[0]
    if node.operator in ("getcolor", "getshape"):
        return colour_class(colour) if node.operator == "getcolor" else shape_class(shape)
    return 0 if true else 1


def collate(trials: Sequence[Trial]) -> GCogBatch:
    """Trials as one batch; shorter programs get rows of zeros at the end."""
    rules = torch.nn.utils.rnn.pad_sequence([trial.rule for trial in trials], batch_first=True)
    return GCogBatch(rules, torch.stack([t.stim for t in trials]), torch.tensor([t.target for t in trials]))
