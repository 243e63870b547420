"""Boundary predictors as files."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from regard.errors import ArgumentError
from regard.methods.language.dhsa.predictor import (
    BoundaryPredictor,
    BoundarySimilarity,
    BoundarySimilarityAttn,
    BoundarySimilarityStack,
)

KINDS: dict[str, type[BoundaryPredictor]] = {
    "conv": BoundarySimilarity,
    "attn": BoundarySimilarityAttn,
    "stack": BoundarySimilarityStack,
}


def save_predictor(predictor: BoundaryPredictor, path: str | Path, kwargs: dict, **notes: str) -> None:
    """Save a predictor in half precision, with its kind, the arguments it was built with, and notes on its making."""
    kind = next(kind for kind, cls in KINDS.items() if type(predictor) is cls)
    state = {name: tensor.half().contiguous() for name, tensor in predictor.state_dict().items()}
    save_file(state, path, {"kind": kind, "kwargs": json.dumps(kwargs), **notes})


def load_predictor(path: str | Path) -> BoundaryPredictor:
    """The predictor saved at `path`, in float32 and eval mode.

    Raises:
        ArgumentError: the file cannot be read, or was not written by `save_predictor`.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        predictor = KINDS[metadata["kind"]](**json.loads(metadata["kwargs"]))
    except Exception as error:
        raise ArgumentError(f"predictor: cannot read {str(path)!r} as a saved boundary predictor: {error}") from error
    predictor.load_state_dict(state)
    return predictor.eval().requires_grad_(False)
