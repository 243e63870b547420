"""Texts and their tokens."""

import pytest

from regard.errors import ArgumentError
from regard.tasks import english, read_text, tokenize
from regard.tasks.text import opening
from tests.tiny_tokenizer import tiny_tokenizer


def test_english_is_prose_and_the_same_every_time():
    text = english()
    paragraphs = text.split("\n\n")
    assert english() == text
    assert len(text) > 100_000
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert paragraph[0].isupper()
        assert paragraph.endswith(".")
        assert "\n" not in paragraph
        assert "::=" not in paragraph


def test_tokenize_reads_a_prefix():
    tokenizer, text = tiny_tokenizer(), english()[:30_000]
    everything = tokenize(tokenizer, text)
    assert tokenizer.decode(everything) == text
    for length in (0, 1, 7, 500, len(everything)):
        assert tokenize(tokenizer, text, length) == everything[:length]
    assert tokenize(tokenizer, text, 10 * len(everything)) == everything


def test_tokenize_leaves_special_tokens_to_opening():
    plain, bos = tiny_tokenizer(), tiny_tokenizer(bos=True)
    assert tokenize(bos, "Assignments") == tokenize(plain, "Assignments")
    assert opening(plain) == []
    assert opening(bos) == [bos.bos_token_id]


def test_read_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Grüße, 世界.", encoding="utf-8")
    assert read_text(path) == "Grüße, 世界."


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"abc\xff\xfe", r"is not UTF-8 text \(byte 3\)")],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        read_text(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ArgumentError, match=r"text: cannot read .*nowhere\.txt': No such file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(ArgumentError, match="text: cannot read"):
        read_text(tmp_path)
