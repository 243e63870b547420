"""Passkey tasks: the keys are where they say, and can be found by reading."""

import re

import pytest

from regard.errors import ArgumentError
from regard.tasks import english, passkey_task
from tests.tiny_tokenizer import tiny_tokenizer

TEXT = english()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("length", "count"), [(700, 1), (1500, 4), (2048, 12)])
def test_every_key_is_in_its_place(bos, length, count):
    tokenizer = tiny_tokenizer(bos)
    task = passkey_task(tokenizer, TEXT, length, count)
    assert len(task.haystack) == length
    assert len(task.passkeys) == count
    assert (task.haystack[0] == tokenizer.bos_token_id) == bos
    for i, passkey in enumerate(task.passkeys):
        stated = tokenizer.decode(task.haystack[passkey.start : passkey.stop])
        assert stated.count(f"{passkey.name} is {passkey.key}") == 2
        assert passkey.depth == passkey.start / length
        assert abs(passkey.depth - (i + 0.5) / count) < 1 / count
        question, answer = tokenizer.decode(passkey.question), tokenizer.decode(passkey.answer)
        assert question.endswith(f"What is the {passkey.name}? The {passkey.name} is")
        assert answer.strip() == passkey.key
    assert len({passkey.name for passkey in task.passkeys}) == count


def test_questions_share_their_beginning():
    tokenizer = tiny_tokenizer()
    task = passkey_task(tokenizer, TEXT, 1500, 5)
    assert tokenizer.decode(task.prefix) == "\n\nWhat is the"
    alone = passkey_task(tokenizer, TEXT, 1500, 1)
    assert alone.prefix == alone.passkeys[0].question


def test_the_text_around_is_the_text():
    tokenizer = tiny_tokenizer()
    task = passkey_task(tokenizer, TEXT, 1500, 3)
    rest = re.sub(
        r"\n\nThe [a-z ]+ is \d{4}\. Remember that the [a-z ]+ is \d{4}\.", "", tokenizer.decode(task.haystack)
    )
    assert TEXT.startswith(rest)


def test_a_text_without_paragraphs_is_divided():
    task = passkey_task(tiny_tokenizer(), TEXT.replace("\n\n", " "), 1500, 5)
    for i, passkey in enumerate(task.passkeys):
        assert abs(passkey.depth - (i + 0.5) / 5) < 1 / 5


def test_seeds():
    def task(seed):
        return passkey_task(tiny_tokenizer(), TEXT, 1000, 4, seed)

    assert task(3) == task(3)
    assert [p.key for p in task(3).passkeys] != [p.key for p in task(4).passkeys]


@pytest.mark.parametrize(
    ("length", "count", "text", "message"),
    [
        (700, 0, TEXT, "passkeys must be between 1 and 12, got 0"),
        (700, 13, TEXT, "passkeys must be between 1 and 12, got 13"),
        (60, 4, TEXT, r"context of 60 tokens is too short for 4 passkeys, which take \d+"),
        (700, 1, "Too short.", r"text has \d+ tokens, expected at least \d+"),
    ],
)
def test_refusals(length, count, text, message):
    with pytest.raises(ArgumentError, match=message):
        passkey_task(tiny_tokenizer(), text, length, count)
