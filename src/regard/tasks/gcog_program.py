"""The programs of gCOG as arrays: their alphabet, their encoding, and an interpreter that reads nothing else."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError

SHAPES = tuple("abcdefghijklmnopqrstuvwxyz")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "pink", "cyan", "brown")
OPERATORS = ("exist", "go", "getcolor", "getshape", "sumeven", "producteven", "productodd", "sumodd", "switch")
#: operators that sum or multiply the coordinates of one or two objects and ask for the parity
PARITY = ("sumeven", "producteven", "productodd", "sumodd")
GRID = 10
CELLS = GRID * GRID
RULE_DIM, STIM_DIM = 8, 3
NUM_CLASSES = 2 + CELLS + len(SHAPES) + len(COLOURS)
_SWITCH = OPERATORS.index("switch")


@dataclass(frozen=True)
class Node:
    """One operator with the objects it selects, each (shape, colour) as indices."""

    operator: str
    objects: tuple[tuple[int, int], ...] = ()


def location_class(y: int, x: int) -> int:
    """The class of a place on the grid; True is 0 and False 1."""
    return 2 + GRID * x + y


def shape_class(shape: int) -> int:
    return 2 + CELLS + shape


def colour_class(colour: int) -> int:
    return 2 + CELLS + len(SHAPES) + colour


def class_name(target: int) -> str:
    """What a class says: "true", "(y=3, x=1)", "shape b", "colour red"."""
    if target < 2:
        return "true" if target == 0 else "false"
    if target < 2 + CELLS:
        x, y = divmod(target - 2, GRID)
        return f"(y={y}, x={x})"
    at = target - 2 - CELLS
    return f"shape {SHAPES[at]}" if at < len(SHAPES) else f"colour {COLOURS[at - len(SHAPES)]}"


def encode_rule(nodes: list[Node]) -> list[list[int]]:
    """Rows ``[op, shape, colour, when, shape, colour, when, EOS]``, in breadth order, indices counted from 1.

    A feature that the operator asks for, and does not give, is 1 too; a second object that is not there is 0.
    """
    rows = []
    for node in nodes:
        row = [OPERATORS.index(node.operator) + 1] + [0] * 7
        for i, (shape, colour) in enumerate(node.objects):
            shape = 0 if node.operator == "getshape" else shape
            colour = 0 if node.operator == "getcolor" else colour
            row[1 + 3 * i : 4 + 3 * i] = [shape + 1, colour + 1, 1]
        rows.append(row)
    return [*rows, [0] * 7 + [1]]


def parse_rule(rule: Tensor) -> list[Node]:
    """The program of rows (N, 8); rows of zeros before or after it are padding.

    Raises:
        ShapeError: not (N, 8).
        ArgumentError: no program, or one that is not a full tree.
    """
    if rule.dim() != 2 or rule.shape[1] != RULE_DIM:
        raise ShapeError(f"rule: expected (N, {RULE_DIM}), got {tuple(rule.shape)}")
    rows = [[int(value) for value in row] for row in rule.tolist() if any(row)]
    if not rows or rows[-1] != [0] * 7 + [1] or not all(1 <= row[0] <= len(OPERATORS) for row in rows[:-1]):
        raise ArgumentError(f"rule: expected operators 1 to {len(OPERATORS)} and then EOS, got rows {rows}")
    nodes = []
    for row in rows[:-1]:
        objects = tuple((row[i] - 1, row[i + 1] - 1) for i in (1, 4) if row[i])
        if not all(0 <= shape < len(SHAPES) and 0 <= colour < len(COLOURS) for shape, colour in objects):
            raise ArgumentError(f"rule: shapes are 1 to {len(SHAPES)} and colours 1 to {len(COLOURS)}, got row {row}")
        nodes.append(Node(OPERATORS[row[0] - 1], objects))
    children(nodes)
    return nodes


def children(nodes: list[Node]) -> list[tuple[int, ...]]:
    """By node, its children: an operator before a switch has the switch, a switch has the two that it chooses from.

    Raises:
        ArgumentError: the nodes are no such tree in breadth order.
    """
    below: list[tuple[int, ...]] = [() for _ in nodes]
    level, end = [0], 1
    while end < len(nodes):
        at_switch = nodes[level[0]].operator == "switch"
        width = 2 if at_switch else 1
        following = list(range(end, end + width * len(level)))
        right = end + len(following) <= len(nodes)
        if not right or any((nodes[i].operator == "switch") == at_switch for i in following):
            raise ArgumentError(f"rule: not a tree of statements and switches: {[node.operator for node in nodes]}")
        for i, parent in enumerate(level):
            below[parent] = tuple(following[width * i : width * (i + 1)])
        level, end = following, end + len(following)
    if not nodes or any(nodes[i].operator == "switch" for i in level):
        raise ArgumentError("rule: a switch chooses between two operators, and these are missing")
    return below


def evaluate_program(rule: Tensor, stim: Tensor) -> int:
    """The class that a program gives on a scene, found by reading both.

        exist    is there an object of this shape and colour      True or False
        go       where it is                                      (y, x)
        getcolor, getshape    of the object of this shape, this colour
        sum*, product*        v = Σ (y + x) or Π y x of the objects; is v even (odd)
        switch   of the statement before it: True gives the first program after it, False the second

    Args:
        rule: (N, 8), see `encode_rule`; rows of zeros around it are padding.
        stim: (101, 3), or (101, 3, 1): cell 10 y + x holds (colour, shape, 0) counted from 1, zeros where it is empty.

    Raises:
        ShapeError: not these shapes.
        ArgumentError: no program, or one that asks for an object that is not there.
    """
    stim = stim.squeeze(-1) if stim.dim() == 3 else stim
    if tuple(stim.shape) != (CELLS + 1, STIM_DIM):
        raise ShapeError(f"stim: expected ({CELLS + 1}, {STIM_DIM}), got {tuple(stim.shape)}")
    nodes = parse_rule(rule)
    below = children(nodes)
    scene = [(i // GRID, i % GRID, int(s) - 1, int(c) - 1) for i, (c, s, _) in enumerate(stim[:-1].tolist()) if s]
    at = 0
    while below[at]:
        switch = below[at][0]
        at = below[switch][0 if _answer(nodes[at], scene) == 0 else 1]
    return _answer(nodes[at], scene)


def decode_rule(rule: Tensor) -> str:
    """A program in words: "if sumeven(red a, blue c) then getcolor(shape b) else go(pink d)"."""
    nodes = parse_rule(rule)
    below = children(nodes)

    def words(at: int) -> str:
        node = nodes[at]
        said = f"{node.operator}({', '.join(_object(node.operator, *one) for one in node.objects)})"
        if not below[at]:
            return said
        first, second = below[below[at][0]]
        return f"if {said} then {_bracket(words(first))} else {_bracket(words(second))}"

    return words(0)


def _bracket(said: str) -> str:
    return f"[{said}]" if said.startswith("if ") else said


def _object(operator: str, shape: int, colour: int) -> str:
    if operator == "getcolor":
        return f"shape {SHAPES[shape]}"
    return f"colour {COLOURS[colour]}" if operator == "getshape" else f"{COLOURS[colour]} {SHAPES[shape]}"


def _answer(node: Node, scene: list[tuple[int, int, int, int]]) -> int:
    """Class of one operator on objects (y, x, shape, colour); of several that fit, the first in reading order."""
    found = []
    for shape, colour in node.objects:
        fits = [
            one
            for one in scene
            if (node.operator == "getshape" or one[2] == shape) and (node.operator == "getcolor" or one[3] == colour)
        ]
        if node.operator == "exist":
            return 0 if fits else 1
        if not fits:
            raise ArgumentError(f"stim: {node.operator} asks for {_object(node.operator, shape, colour)}: not there")
        found.append(fits[0])
    y, x, shape, colour = found[0]
    if node.operator == "go":
        return location_class(y, x)
    if node.operator in ("getcolor", "getshape"):
        return colour_class(colour) if node.operator == "getcolor" else shape_class(shape)
    return 0 if is_even(node.operator, [one[:2] for one in found]) == node.operator.endswith("even") else 1


def is_even(operator: str, places: list[tuple[int, int]]) -> bool:
    """Whether the sum of all coordinates, or their product, is even."""
    if operator.startswith("sum"):
        return sum(y + x for y, x in places) % 2 == 0
    return any(y % 2 == 0 or x % 2 == 0 for y, x in places)


def scene_rows(objects: dict[tuple[int, int], tuple[int, int]]) -> Tensor:
    """(101, 3) of objects {(y, x): (shape, colour)}, with EOS in the last row."""
    rows = np.zeros((CELLS + 1, STIM_DIM), np.float32)
    for (y, x), (shape, colour) in objects.items():
        rows[GRID * y + x, :2] = colour + 1, shape + 1
    rows[-1, -1] = 1
    return torch.from_numpy(rows)
