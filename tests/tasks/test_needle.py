"""Needles: where they are put, what is asked, and how an answer is scored."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError
from regard.tasks import Needle, english, needle_in_haystack, needle_run, rouge1_recall
from regard.tasks.rouge import stem
from tests.tiny_tokenizer import tiny_tokenizer

NEEDLE = Needle(
    "The cat sleeps under a red boat near Oslo.", "Where does the cat sleep?", "under a red boat near Oslo."
)


@given(
    tokens=st.lists(st.integers(0, 9), max_size=60),
    needle=st.lists(st.integers(100, 109), min_size=1, max_size=5),
    depth=st.floats(0, 1),
    length=st.integers(10, 60),
    buffer=st.integers(0, 5),
)
def test_the_needle_stands_behind_a_sentence(tokens, needle, depth, length, buffer) -> None:
    found, place = needle_in_haystack(tokens, needle, depth, length, {0, 1}, buffer=buffer)
    room = length - buffer - len(needle)
    hay = found[:place] + found[place + len(needle) :]
    assert found[place : place + len(needle)] == needle
    assert hay == tokens[:room]
    wanted = int(len(hay) * depth)
    if depth == 1:
        assert place == len(hay)
    else:  # the last end of a sentence not after the wanted place
        ends = [i + 1 for i, token in enumerate(hay) if token in (0, 1) and i + 1 <= wanted]
        assert place == (ends[-1] if ends else 0)


def test_by_hand() -> None:
    assert needle_in_haystack([5, 0, 5, 5, 0, 5], [7], 0.7, 207, {0}) == ([5, 0, 7, 5, 5, 0, 5], 2)
    assert needle_in_haystack([5, 0, 5, 5, 0, 5], [7], 1.0, 207, {0}) == ([5, 0, 5, 5, 0, 5, 7], 6)
    assert needle_in_haystack([5, 0, 5, 5, 0, 5], [7], 0.5, 204, {0}) == ([7, 5, 0, 5], 0)


@settings(deadline=None, max_examples=20)
@given(depth=st.floats(0, 1), length=st.integers(120, 400), primed=st.booleans(), bos=st.booleans())
def test_a_run_holds_its_answer_where_it_says(depth, length, primed, bos) -> None:
    tokenizer = tiny_tokenizer(bos)
    run = needle_run(tokenizer, english(), NEEDLE, length, depth, primed=primed)
    assert len(run.prompt) == length
    assert (run.prompt[0] == tokenizer.bos_token_id) == bos
    assert tokenizer.decode(run.prompt[slice(*run.span)]) == " under a red boat near Oslo."
    text = tokenizer.decode(run.prompt)
    assert text.count(f" {NEEDLE.text}") == 1
    ending = "Based on the content of the book, Question: Where does the cat sleep?\nAnswer:"
    assert text.endswith(f"\n{ending}" + (" The cat sleeps" if primed else ""))


def test_recall_counts_stems() -> None:
    run = needle_run(tiny_tokenizer(), english(), NEEDLE, 200, 0.5)
    assert run.recall("It is UNDER a red boat, near Oslo!") == 1
    assert run.recall("red boats") == 2 / 6
    assert run.recall("") == 0
    assert rouge1_recall("the cat the cat", "the dog and the cat") == 3 / 4  # no word counts twice
    assert rouge1_recall("two boats", "two boat") == 1
    assert rouge1_recall("two boats", "two boat", stemmed=False) == 0.5
    assert rouge1_recall("", "anything") == 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # the examples of the publication, carried through all steps
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "ti"), ("caress", "caress"), ("cats", "cat"),
        ("feed", "feed"), ("agreed", "agre"), ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"),
        ("sing", "sing"), ("conflated", "conflat"), ("troubled", "troubl"), ("sized", "size"), ("hopping", "hop"),
        ("tanned", "tan"), ("falling", "fall"), ("hissing", "hiss"), ("fizzed", "fizz"), ("failing", "fail"),
        ("filing", "file"), ("happy", "happi"), ("sky", "sky"), ("relational", "relat"), ("conditional", "condit"),
        ("rational", "ration"), ("valenci", "valenc"), ("digitizer", "digit"), ("radicalli", "radic"),
        ("vileli", "vile"), ("analogousli", "analog"), ("vietnamization", "vietnam"), ("predication", "predic"),
        ("operator", "oper"), ("feudalism", "feudal"), ("decisiveness", "decis"), ("hopefulness", "hope"),
        ("callousness", "callous"), ("formaliti", "formal"), ("sensitiviti", "sensit"), ("sensibiliti", "sensibl"),
        ("triplicate", "triplic"), ("formative", "form"), ("formalize", "formal"), ("electrical", "electr"),
        ("hopeful", "hope"), ("goodness", "good"), ("revival", "reviv"), ("allowance", "allow"),
        ("inference", "infer"), ("airliner", "airlin"), ("adjustable", "adjust"), ("defensible", "defens"),
        ("irritant", "irrit"), ("replacement", "replac"), ("adjustment", "adjust"), ("dependent", "depend"),
        ("adoption", "adopt"), ("homologou", "homolog"), ("communism", "commun"), ("activate", "activ"),
        ("effective", "effect"), ("bowdlerize", "bowdler"), ("probate", "probat"), ("rate", "rate"),
        ("cease", "ceas"), ("controll", "control"), ("roll", "roll"), ("generalizations", "gener"),
        ("oscillators", "oscil"), ("is", "is"),
    ],
)  # fmt: skip
def test_porter_stems(word, expected) -> None:
    assert stem(word) == expected


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"depth must be from 0 to 1, got 1\.5"):
        needle_in_haystack([1], [2], 1.5, 300, set())
    with pytest.raises(ArgumentError, match="length: 202 tokens without 200"):
        needle_in_haystack([1], [2, 2, 2], 0.5, 202, set())
    with pytest.raises(ArgumentError, match="answer: expected the last words"):
        Needle("The cat sleeps.", "What?", "under a boat")
    with pytest.raises(ArgumentError, match="text has"):
        needle_run(tiny_tokenizer(), "Short.", NEEDLE, 300, 0.5)
    with pytest.raises(ArgumentError, match="do not hold a needle"):
        needle_run(tiny_tokenizer(), english(), NEEDLE, 40, 0.5)
