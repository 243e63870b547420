"""Text to read, and its tokens."""

import re
from pathlib import Path
from typing import Any

from regard.errors import ArgumentError

_SHORTEST_PARAGRAPH = 80  # characters; shorter ones in the manual are headings, labels and list items
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on prose, so one try is usually enough


def english() -> str:
    """About 29,000 tokens of English prose that every Python has: paragraphs of its manual (`pydoc_data.topics`).

    Only flowing text is taken: no grammar, code, headings or lists, and no paragraph twice.
    """
    from pydoc_data.topics import topics

    paragraphs = (p for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name]))
    return "\n\n".join(dict.fromkeys(" ".join(p.split()) for p in paragraphs if _is_prose(p)))


def _is_prose(paragraph: str) -> bool:
    return (
        len(paragraph) >= _SHORTEST_PARAGRAPH
        and paragraph[0].isupper()
        and paragraph.endswith(".")
        and "::=" not in paragraph
        and not re.search(r"^\s", paragraph, re.MULTILINE)
    )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ArgumentError: it cannot be read, is no UTF-8 text, or holds nothing but white space.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"text: cannot read {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"text: {str(path)!r} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ArgumentError(f"text: {str(path)!r} is empty")
    return text


def tokenize(tokenizer: Any, text: str, length: int | None = None) -> list[int]:
    """Token ids of `text` without special tokens: all, or the first `length` (fewer where the text is shorter).

    Reads no more of a long text than it needs.
    """
    if length == 0:
        return []
    end = len(text) if length is None else length * _CHARACTERS_PER_TOKEN
    while True:
        ids = tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"]
        if end >= len(text) or (length is not None and len(ids) > length):  # a token cut off at the end is not used
            return ids[:length]
        end *= 2


def opening(tokenizer: Any) -> list[int]:
    """The tokens the tokenizer puts before every text (a BOS token, or nothing)."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
