"""Stimuli of `DiSRT` as files: originals and their syntheses, which take long to make, beside a manifest."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, require
from regard.tasks.texture import gram_loss, grams, texture_synthesis


class Quality(NamedTuple):
    """gram (T, 2), the loss of each synthesis over that of unrelated pictures; correlation (T, 2) with its original."""

    gram: Tensor
    correlation: Tensor

    def valid(self, gram: float = 0.01, correlation: float = 0.2) -> Tensor:
        """(T,) bool: both syntheses match and neither resembles the original."""
        return ((self.gram < gram) & (self.correlation < correlation)).all(1)


@torch.no_grad()
def stimulus_quality(triples: Tensor, extractor: nn.Module, layers: Sequence[str]) -> Quality:
    """Whether syntheses have the statistics of their original and not its arrangement.

    Args:
        triples: (T, 3, C, H, W), the original first, of at least two pictures.
        extractor, layers: those of the synthesis.

    Raises:
        ShapeError: other dimensions, or a single picture.
    """
    if triples.dim() != 5 or triples.shape[1] != 3 or len(triples) < 2:
        raise ShapeError(f"triples: expected (T, 3, C, H, W) with T at least 2, got {tuple(triples.shape)}")
    originals, *syntheses = (grams(pictures, extractor, layers) for pictures in triples.unbind(1))
    count = len(triples)
    others = [gram_loss(originals, [g.roll(shift, 0) for g in originals]) for shift in range(1, count)]
    unrelated = torch.stack(others).mean(0)
    losses = torch.stack([gram_loss(found, originals) for found in syntheses], 1)
    flat = triples.flatten(2).double()
    unit = torch.nn.functional.normalize(flat - flat.mean(2, keepdim=True), dim=2)
    return Quality(losses / unrelated[:, None], (unit[:, 1:] * unit[:, :1]).sum(2))


def write_stimuli(
    folder: str | Path,
    pictures: Mapping[str, Tensor],
    extractor: nn.Module,
    layers: Sequence[str],
    synthesis: str,
    steps: int = 300,
    seeds: tuple[int, int] = (1, 2),
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Synthesise two distorted versions of each picture, unless they are in the folder already.

    Files: ``{id}/orig.png``, ``{id}/syn_{seed}.png``, 8 bits per channel, and ``manifest.json``.

    Args:
        folder: made if it is not there.
        pictures: (C, H, W) in [0, 1] with one or three channels, by id.
        extractor, layers, steps: see `texture_synthesis`.
        synthesis: what to call the kind of stimuli, such as "random-filter Gram matching".
        seeds: of the noise.
        on_progress: called with the pictures done and their number.

    Returns:
        The manifest's path.

    Raises:
        ArgumentError: equal seeds, an id that is no file name, or a manifest there that was made with other arguments.
        MissingExtra: pillow is not installed.
    """
    if len(seeds) != 2 or seeds[0] == seeds[1]:
        raise ArgumentError(f"seeds: expected two that differ, got {seeds}")
    if bad := [name for name in pictures if Path(name).name != name or name in ("", ".", "..")]:
        raise ArgumentError(f"pictures: expected ids that are file names, got {bad}")
    folder = Path(folder)
    path = folder / "manifest.json"
    made_with = {"synthesis": synthesis, "layers": list(layers), "iterations": steps, "seeds": list(seeds)}
    manifest: dict[str, Any] = {**made_with, "pictures": []}
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if {name: manifest.get(name) for name in made_with} != made_with:
        raise ArgumentError(f"folder: {path} was made with other arguments")
    there = {entry["id"] for entry in manifest["pictures"]}
    for done, (name, picture) in enumerate(pictures.items()):
        if name not in there:
            (folder / name).mkdir(parents=True, exist_ok=True)
            _write_png(folder / name / "orig.png", picture)
            losses = []
            for seed in seeds:
                texture = texture_synthesis(picture, extractor, layers, steps, seed)
                _write_png(folder / name / f"syn_{seed}.png", texture.images)
                losses.append(float(texture.loss))
            manifest["pictures"].append({"id": name, "final_loss": losses})
            path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if on_progress is not None:
            on_progress(done + 1, len(pictures))
    return path


def read_stimuli(manifest: str | Path) -> Tensor:
    """(T, 3, C, H, W) of a manifest or its folder, the original first.

    Raises:
        ArgumentError: there is no manifest, or no picture in it.
        MissingExtra: pillow is not installed.
    """
    path = Path(manifest)
    path = path / "manifest.json" if path.is_dir() else path
    if not path.exists():
        raise ArgumentError(f"stimuli: there is no manifest {path}")
    found = json.loads(path.read_text(encoding="utf-8"))
    names = ["orig.png", *(f"syn_{seed}.png" for seed in found["seeds"])]
    triples = [
        torch.stack([_read_png(path.parent / entry["id"] / name) for name in names]) for entry in found["pictures"]
    ]
    if not triples:
        raise ArgumentError(f"stimuli: there are no pictures in {path}")
    return torch.stack(triples)


def _write_png(path: Path, picture: Tensor) -> None:
    levels = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    image = require("PIL.Image", "write pictures")
    image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(path)


def _read_png(path: Path) -> Tensor:
    with require("PIL.Image", "read pictures").open(path) as image:
        levels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return levels[None] if levels.dim() == 2 else levels.movedim(-1, 0)
