"""Small tasks that classify real images which come inside packages: digits, textures, and which way is up.

Each is a frozen dataclass with ``num_classes``, ``size``, ``test_size`` and ``batch(split, index, batch_size, seed)``,
which gives grey images (B, 1, size, size) and their classes. Every image has mean 0 and variance 1: brightness and
contrast say nothing. Score: `top1`. The same arguments always give the same batch, and no pixel is in both splits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.tasks import corpora
from regard.tasks.sequence import Split, generator

#: photos that are one texture all over
TEXTURES = ("brick", "chelsea", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "motorcycle")
#: photos with an up and a down
UPRIGHT = ("brick", "china", "coins", "rocket")


class ImageBatch(NamedTuple):
    """images (B, 1, size, size) float32, targets (B,) long."""

    images: Tensor
    targets: Tensor


class ImageTask(Protocol):
    """What a study needs of a task; tests are ``test_size`` images, in batches counted from 0."""

    metric: ClassVar[str]

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def test_size(self) -> int: ...
    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> ImageBatch: ...


def top1(logits: Tensor, targets: Tensor) -> float:
    """The share of images whose most likely class is the right one."""
    return (logits.argmax(-1) == targets).float().mean().item()


def resample(images: Tensor, size: int) -> Tensor:
    """(..., C, H, W) to (..., C, size, size), bilinear, without aliasing."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _standard(images: Tensor) -> Tensor:
    centred = images - images.mean((-2, -1), keepdim=True)
    return centred / centred.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-2)


_DIGITS: dict[str, Callable[[], corpora.Digits]] = {"mnist": corpora.mnist, "8x8": corpora.small_digits}


@dataclass(frozen=True)
class Digits:
    """Handwritten digits from 0 to 9, enlarged: MNIST's or scikit-learn's of 8×8 pixels; guessing gives 0.1.

    Every tenth of MNIST's, and of the others the last fifth, mostly by other writers, is for tests: in order, while
    training batches are drawn with equally many of each digit.
    """

    source: Literal["mnist", "8x8"] = "mnist"
    size: int = 64
    metric: ClassVar[str] = "top-1"
    num_classes: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.source not in _DIGITS:
            raise ArgumentError(f"source: expected one of {', '.join(_DIGITS)}, got {self.source!r}")
        if self.size < 1:
            raise ArgumentError(f"size: expected at least 1, got {self.size}")

    @property
    def name(self) -> str:
        return f"digits {self.source}"

    @property
    def test_size(self) -> int:
        return int(self._for_tests().sum())

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> ImageBatch:
        g = generator(split, index, seed)
        images, labels = _DIGITS[self.source]()
        if split == "test":
            rows = self._for_tests().nonzero()[index * batch_size : (index + 1) * batch_size, 0]
        else:
            own = [(~self._for_tests() & (labels == digit)).nonzero()[:, 0] for digit in range(10)]
            wanted = _balanced(batch_size, 10, g)
            rows = torch.stack([own[c][torch.randint(len(own[c]), (), generator=g)] for c in wanted.tolist()])
        return ImageBatch(_standard(resample(images[rows, None].float() / 255, self.size)), labels[rows])

    def _for_tests(self) -> Tensor:
        n = len(_DIGITS[self.source]().labels)
        return torch.arange(n) % 10 == 0 if self.source == "mnist" else torch.arange(n) >= n - n // 5


@dataclass(frozen=True)
class Patches:
    """Square pieces of real photos: which of eight textures they show, or by how many quarters they were turned.

    Train patches come from the left three quarters of each photo, test patches from the right one. Sides are drawn from
    ``sides`` (both ends included) and scaled to ``size``, and left and right are swapped at random, so that what is
    looked for is not the place. Classes come equally often; guessing gives 1/8 and 1/4.
    """

    label: Literal["texture", "rotation"] = "texture"
    size: int = 64
    sides: tuple[int, int] = (48, 75)
    test_size: int = 1024
    metric: ClassVar[str] = "top-1"

    def __post_init__(self) -> None:
        if self.label not in ("texture", "rotation"):
            raise ArgumentError(f"label: expected 'texture' or 'rotation', got {self.label!r}")
        if self.size < 1 or self.test_size < 1:
            raise ArgumentError(f"size and test_size: expected at least 1, got {self.size} and {self.test_size}")
        if not 1 <= self.sides[0] <= self.sides[1]:
            raise ArgumentError(f"sides: expected the smaller one first, at least 1, got {self.sides}")

    @property
    def name(self) -> str:
        return self.label

    @property
    def num_classes(self) -> int:
        return len(TEXTURES) if self.label == "texture" else 4

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> ImageBatch:
        g = generator(split, index, seed)
        targets = _balanced(batch_size, self.num_classes, g)
        images = torch.stack([self._patch(target, split, g) for target in targets.tolist()])
        return ImageBatch(_standard(images), targets)

    def _patch(self, target: int, split: Split, g: torch.Generator) -> Tensor:
        name = TEXTURES[target] if self.label == "texture" else UPRIGHT[_draw(len(UPRIGHT), g)]
        patch = self._cut(name, split, g)
        patch = patch.flip(-1) if _draw(2, g) else patch
        return patch if self.label == "texture" else patch.rot90(target, (-2, -1))

    def _cut(self, name: str, split: Split, g: torch.Generator) -> Tensor:
        pixels = region(corpora.photo(name), split)
        side = self.sides[0] + _draw(self.sides[1] - self.sides[0] + 1, g)
        if side > min(pixels.shape):
            raise ArgumentError(f"sides: the {split} part of {name} has {tuple(pixels.shape)} pixels, got {self.sides}")
        top, left = (_draw(length - side + 1, g) for length in pixels.shape)
        return resample(pixels[None, None, top : top + side, left : left + side], self.size)[0]


def region(pixels: Tensor, split: Split) -> Tensor:
    """The part of a photo (H, W) that belongs to a split."""
    cut = 3 * pixels.shape[1] // 4
    return pixels[:, :cut] if split == "train" else pixels[:, cut:]


def _draw(below: int, g: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=g))


def _balanced(count: int, classes: int, g: torch.Generator) -> Tensor:
    """Each class equally often, up to one, in random order; which ones come once more is random."""
    return torch.randperm(classes, generator=g).repeat(-(-count // classes))[:count][torch.randperm(count, generator=g)]


#: what `regard study vision` trains on; rotations are left out: trials stayed near guessing
TASKS: Sequence[ImageTask] = (Digits("mnist"), Digits("8x8"), Patches("texture"))
