"""What a study reads with and from: a model with its tokenizer, and a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.errors import ArgumentError
from regard.study import models
from regard.tasks import english, read_text


def source(text: str | Path | None) -> tuple[str, str]:
    """Where the text comes from, and the text."""
    if text is None:
        return "English prose from Python's manual (pydoc_data.topics)", english()
    if isinstance(text, Path):
        return str(text), read_text(text)
    if not text.strip():
        raise ArgumentError("text is empty")
    return f"given text ({len(text):,} characters)", text


def network(model: Any, device: str | torch.device, dtype: str | torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded if they are given by name.

    Raises:
        ArgumentError: neither a name, a path nor such a pair; or it cannot be loaded.
    """
    if isinstance(model, str | Path):
        return models.load(model, device=device, dtype=dtype)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        return model
    raise ArgumentError(f"model must be a name, a path or (model, tokenizer), got {type(model).__name__}")


def name_of(model: Any) -> str:
    """Of a model that was not given by name."""
    return model.config.name_or_path or type(model).__name__


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
