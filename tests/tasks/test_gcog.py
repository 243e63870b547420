"""gCOG: programs read by hand, the generator against the interpreter, what splits keep apart, and balance."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError, ShapeError
from regard.tasks.gcog import END_SETS, OPERATOR_SETS, START_SETS, GCog, collate
from regard.tasks.gcog_program import (
    NUM_CLASSES,
    OPERATORS,
    Node,
    class_name,
    decode_rule,
    encode_rule,
    evaluate_program,
    parse_rule,
    scene_rows,
)
from regard.tasks.gcog_splits import generalisation

A, B, C, D = range(4)  # shapes
RED, GREEN, BLUE, YELLOW = range(4)
SCENE = {(1, 2): (A, RED), (3, 3): (B, GREEN), (0, 7): (C, BLUE), (9, 4): (D, RED)}


def answer(*nodes: Node) -> str:
    return class_name(evaluate_program(torch.tensor(encode_rule(list(nodes))), scene_rows(SCENE)))


@pytest.mark.parametrize(
    ("operator", "objects", "expected"),
    [
        ("exist", [(A, RED)], "true"),
        ("exist", [(A, GREEN)], "false"),
        ("go", [(C, BLUE)], "(y=0, x=7)"),
        ("getcolor", [(B, RED)], "colour green"),
        ("getshape", [(A, BLUE)], "shape c"),
        ("sumeven", [(A, RED)], "false"),  # 1 + 2
        ("sumodd", [(A, RED)], "true"),
        ("sumeven", [(A, RED), (C, BLUE)], "true"),  # 3 + 7
        ("producteven", [(B, GREEN)], "false"),  # 9
        ("productodd", [(B, GREEN)], "true"),
        ("productodd", [(B, GREEN), (C, BLUE)], "false"),  # 9 * 0
    ],
)
def test_operators(operator, objects, expected) -> None:
    assert answer(Node(operator, tuple(objects))) == expected


def test_switches_choose_in_breadth_order() -> None:
    true, false = Node("exist", ((A, RED),)), Node("exist", ((A, GREEN),))
    ends = [
        Node("getshape", ((A, BLUE),)),
        Node("go", ((A, RED),)),
        Node("getcolor", ((B, RED),)),
        Node("go", ((B, GREEN),)),
    ]
    switch = Node("switch")
    for first, second, third, expected in (
        (true, true, true, "shape c"),
        (true, false, true, "(y=1, x=2)"),
        (false, false, true, "colour green"),
        (false, true, false, "(y=3, x=3)"),
    ):
        assert answer(first, switch, second, third, switch, switch, *ends) == expected


def test_encoding_is_the_published_one() -> None:
    rows = encode_rule(
        [
            Node("sumeven", ((C, RED), (A, BLUE))),
            Node("switch"),
            Node("getcolor", ((D, BLUE),)),
            Node("go", ((B, BLUE),)),
        ]
    )
    assert rows == [
        [5, 3, 1, 1, 1, 3, 1, 0],
        [9, 0, 0, 0, 0, 0, 0, 0],
        [3, 4, 1, 1, 0, 0, 0, 0],
        [2, 2, 3, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert decode_rule(torch.tensor(rows)) == "if sumeven(red c, blue a) then getcolor(shape d) else go(blue b)"


def test_scenes_are_the_published_ones() -> None:
    rows = scene_rows({(3, 7): (B, BLUE)})
    assert rows.shape == (101, 3)
    assert rows[37].tolist() == [3, 2, 0]
    assert rows[100].tolist() == [0, 0, 1]
    assert rows.count_nonzero() == 3
    assert NUM_CLASSES == 138


@given(depth=st.sampled_from([1, 3, 5, 7]), index=st.integers(0, 10**6), most=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_the_interpreter_agrees_with_the_generator(depth, index, most) -> None:
    task = GCog(depth=depth, n_distractors=(most // 2, most), seed=3)
    rule, stim, target = task.trial(index)
    assert evaluate_program(rule, stim) == target
    assert evaluate_program(torch.cat([rule.new_zeros(2, 8), rule, rule.new_zeros(3, 8)]), stim[..., None]) == target
    nodes = parse_rule(rule)
    assert len(nodes) == 3 * 2 ** (depth // 2) - 2
    assert OPERATORS[int(rule[0, 0]) - 1] == nodes[0].operator
    assert int((stim[:-1, 1] > 0).sum()) >= most // 2


def test_nothing_is_ambiguous() -> None:
    for task in (GCog(depth=5, n_distractors=30), GCog(depth=3, n_distractors=5, n_features=5)):
        for rule, stim, _ in itertools.islice(task, 200):
            objects = stim[:-1][stim[:-1, 1] > 0]
            for node in parse_rule(rule):
                for shape, colour in node.objects:
                    of_shape, of_colour = objects[:, 1] == shape + 1, objects[:, 0] == colour + 1
                    found = {"getcolor": of_shape, "getshape": of_colour}.get(node.operator, of_shape & of_colour)
                    assert int(found.sum()) in ((0, 1) if node.operator == "exist" else (1,))


def test_boolean_answers_are_balanced() -> None:
    found: dict[str, Counter] = {}
    for rule, _, target in itertools.islice(GCog(n_distractors=(0, 5)), 8000):
        found.setdefault(parse_rule(rule)[0].operator, Counter())[target] += 1
    for operator in ("exist", "sumeven", "sumodd", "producteven", "productodd"):
        assert set(found[operator]) == {0, 1}
        assert 0.45 < found[operator][0] / found[operator].total() < 0.55, operator
    assert found["go"].keys() <= set(range(2, 102))
    assert len(found["go"]) > 90


def test_both_branches_are_taken() -> None:
    first = 0
    for rule, stim, _ in itertools.islice(GCog(depth=3), 1000):
        statement = torch.cat([rule[:1], rule[-1:]])
        first += evaluate_program(statement, stim) == 0
    assert 450 < first < 550


def test_operators_are_crossed_with_features_they_were_not_trained_with() -> None:
    def pairs(subset) -> dict[str, set]:
        found: dict[str, set] = {}
        for rule, *_ in itertools.islice(GCog(split="operators", subset=subset, n_features=5), 3000):
            node = parse_rule(rule)[0]
            found.setdefault(node.operator, set()).add(node.objects[0])
        return found

    trained, crossed = pairs(1), pairs(2)
    assert trained.keys() == crossed.keys() == {*OPERATOR_SETS[0], *OPERATOR_SETS[1]}
    assert not any(trained[op] & crossed[op] for op in trained)
    assert {colour for _, colour in trained["exist"]} == {0, 1}
    assert {shape for shape, _ in trained["go"]} == {2, 3, 4}
    assert crossed["exist"] == {(s, c) for s in (2, 3, 4) for c in (2, 3, 4)}
    assert crossed["go"] == {(s, c) for s in (0, 1) for c in (0, 1)}
    assert {shape for shape, _ in crossed["getcolor"]} == {0, 1}  # the colour is the answer, and not shown


def test_trees_are_crossed() -> None:
    for subset in (1, 2):
        kinds = set()
        for rule, *_ in itertools.islice(GCog(depth=3, split="trees", subset=subset), 300):
            start, _, *ends = (node.operator for node in parse_rule(rule))
            of_start = 0 if start in START_SETS[0] else 1
            of_end = of_start if subset == 1 else 1 - of_start
            assert set(ends) <= set(END_SETS[of_end])
            kinds.add(of_start)
        assert kinds == {0, 1}


def test_batches_repeat_and_seeds_differ() -> None:
    task = GCog(depth=3, n_distractors=(0, 5), seed=1)
    again = task.batch(2, 4)
    assert all(torch.equal(a, b) for a, b in zip(task.batch(2, 4), again, strict=True))
    assert torch.equal(task.trial(9).stim, again.stim[1])
    assert not torch.equal(task.batch(2, 4).stim, GCog(depth=3, n_distractors=(0, 5), seed=2).batch(2, 4).stim)
    mixed = collate([GCog().trial(0), task.trial(0)])
    assert mixed.rule.shape == (2, 5, 8)
    assert not mixed.rule[0, 2:].any()


@pytest.mark.parametrize("name", ["distractors", "operators", "trees", "productivity"])
def test_generalisation_tests_what_was_not_trained(name) -> None:
    train, tests = generalisation(name, n_features=5, seed=4)
    assert len(tests) > 1
    assert {task.seed for task in train}.isdisjoint(task.seed for task in tests.values())
    assert all(task.trial(0).stim.shape == (101, 3) for task in (*train, *tests.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, "depth: expected an odd number"),
        ({"depth": 11}, "no room for programs deeper"),
        ({"n_distractors": 60}, "n_distractors: expected 0 to 50"),
        ({"n_distractors": (3, 1)}, "n_distractors"),
        ({"split": "shapes"}, "split: expected"),
        ({"split": "trees"}, "does not split programs of depth 1"),
        ({"split": "operators", "depth": 3}, "does not split programs of depth 3"),
        ({"subset": 3}, "subset: expected 1 or 2"),
        ({"n_features": 1}, "n_features: expected 0 or 2"),
    ],
)
def test_refusals(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        GCog(**arguments)


def test_programs_that_are_none_are_refused() -> None:
    stim = scene_rows(SCENE)
    with pytest.raises(ArgumentError, match="not a tree"):
        evaluate_program(torch.tensor(encode_rule([Node("exist", ((A, RED),)), Node("go", ((A, RED),))])), stim)
    with pytest.raises(ArgumentError, match="a switch chooses"):
        evaluate_program(torch.tensor(encode_rule([Node("exist", ((A, RED),)), Node("switch")])), stim)
    with pytest.raises(ArgumentError, match="and then EOS"):
        evaluate_program(torch.ones(1, 8), stim)
    with pytest.raises(ArgumentError, match="go asks for blue a: not there"):
        answer(Node("go", ((A, BLUE),)))
    with pytest.raises(ArgumentError, match="colours 1 to 10"):
        evaluate_program(torch.tensor([[1, 1, 11, 1, 0, 0, 0, 0], [0] * 7 + [1]]), stim)
    with pytest.raises(ShapeError, match="rule: expected"):
        evaluate_program(torch.zeros(3, 7), stim)
    with pytest.raises(ShapeError, match="stim: expected"):
        evaluate_program(torch.tensor(encode_rule([Node("exist", ((A, RED),))])), stim[:50])
    with pytest.raises(ArgumentError, match="name: expected"):
        generalisation("shapes")
    with pytest.raises(ArgumentError, match="no unambiguous program"):
        GCog(depth=7, n_features=2).trial(0)
