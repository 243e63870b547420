"""Compare regard with the outputs of published code.

A golden file holds the published code's weights (`state/…`), inputs (`in/…`), outputs (`out/…`) and gradients
(`grad/…`), and in its metadata the constructor's `kwargs` as JSON. An adapter (`tests/parity/adapters`) computes the
same outputs with regard; `run` judges them.
"""

import json
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.parity import adapters


@dataclass(frozen=True)
class Golden:
    """One golden file.

    Attributes:
        name: the file's stem, a slug or a slug with a suffix.
        metadata: the file's metadata, as strings.
        kwargs: the metadata's `kwargs`, decoded.
        inputs: what stands under `in/`.
        outputs: what must be reproduced: `out/…` without the prefix, and `grad/…` with it.
        weights: all state dicts, see `state`.
    """

    name: str
    metadata: Mapping[str, str]
    kwargs: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        gradients = {key: value for key, value in tensors.items() if key.startswith("grad/")}
        return cls(
            name=path.stem,
            metadata=metadata,
            kwargs=json.loads(metadata.get("kwargs", "{}")),
            inputs=under("in/"),
            outputs=under("out/") | gradients,
            weights={key: value for key, value in tensors.items() if key.startswith("state")},
        )

    def state(self, prefix: str = "", group: str = "state") -> dict[str, Tensor]:
        """The published code's state dict, or the part under `prefix` with the prefix taken off.

        Files with several modules may keep one under a group of its own, such as ``state_attn/…``.
        """
        prefix = f"{group}/{prefix}"
        return {k.removeprefix(prefix): v.clone() for k, v in self.weights.items() if k.startswith(prefix)}

    def compare(self, name: str, got: Tensor, atol: float) -> "Comparison":
        """The comparison of `got` with the whole output called `name`; exact when that is integer or boolean."""
        if name not in self.outputs:
            raise KeyError(f"{self.name} has no output {name!r}; outputs: {', '.join(self.outputs)}")
        want = self.outputs[name]
        return Comparison(name, got, want, atol if want.is_floating_point() else 0.0)


@dataclass(frozen=True)
class Comparison:
    """Regard's value of one output beside the published one; integers and booleans are compared exactly."""

    name: str
    got: Tensor
    want: Tensor
    atol: float


@dataclass(frozen=True)
class Result:
    """A judged comparison; `problem` is empty when it passed."""

    golden: str
    output: str
    error: float
    atol: float
    problem: str = ""

    def __str__(self) -> str:
        line = f"{self.golden} {self.output} {self.error:.3g} {self.atol:.3g}"
        return f"{line}  {self.problem}" if self.problem else line


class Adapters:
    """The adapter modules of a package, by slug; a module is imported when it is used."""

    def __init__(self, package: Any = adapters, slugs: Iterable[str] = ()) -> None:
        self._modules = {
            module.name.replace("_", "-"): f"{package.__name__}.{module.name}"
            for module in pkgutil.iter_modules(package.__path__)
        }
        self._slugs = {*slugs, *self._modules}

    def slug(self, stem: str) -> str | None:
        """The adapter for a golden file: the longest known slug that its stem equals or continues with a hyphen.

        All slugs of the catalogue count, so that `moh` never takes a file of `moh-next`, were there such a system.
        """
        fitting = [slug for slug in self._slugs if f"{stem}-".startswith(f"{slug}-")]
        longest = max(fitting, key=len, default=None)
        return longest if longest in self._modules else None

    def load(self, stem: str) -> Any:
        slug = self.slug(stem)
        if slug is None:
            raise LookupError(f"no adapter for golden file {stem}")
        return import_module(self._modules[slug])


def golden_files(folder: Path) -> list[Path]:
    """The golden files of a folder; one without any is a mistake in the call, not an empty success."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors files in {folder}")
    return files


def run(
    check: Callable[[Golden], Iterable[Comparison]], golden: Golden, not_compared: Mapping[str, str] | None = None
) -> list[Result]:
    """Judge an adapter's comparisons; an output it leaves out without a declared reason is a failed result."""
    results = [judge(golden, comparison) for comparison in check(golden)]
    left = golden.outputs.keys() - {result.output for result in results}
    declared = {name for name in left if any(fnmatchcase(name, pattern) for pattern in not_compared or {})}
    return results + [Result(golden.name, name, math.nan, 0.0, "not compared") for name in sorted(left - declared)]


def judge(golden: Golden, comparison: Comparison) -> Result:
    """Shapes must be equal, and values within `atol`; equal infinities and NaNs in the same places agree."""
    got, want, atol = comparison.got.detach(), comparison.want, comparison.atol
    name = comparison.name.removeprefix("out/")

    def failed(problem: str, error: float = math.inf) -> Result:
        return Result(golden.name, name, error, atol, problem)

    if name not in golden.outputs:
        return failed(f"the file has no such output, only {', '.join(golden.outputs)}")
    if got.shape != want.shape:
        return failed(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not want.is_floating_point() and atol != 0:
        return failed(f"an exact output ({want.dtype}) needs tolerance 0")
    error = max_abs_error(got, want)
    return Result(golden.name, name, error, atol) if error <= atol else failed("differs", error)


def indicators(key: Tensor) -> Tensor:
    """(B, Hk, M, M) one value per key (B, Hk, M, D) of its own: attention to them is the weights."""
    return torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)


def max_abs_error(got: Tensor, want: Tensor) -> float:
    """The largest |got - want|; inf where only one is NaN, or where infinities differ."""
    got, want = got.to(torch.float64), want.to(torch.float64)
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return error.max().item() if error.numel() else 0.0
