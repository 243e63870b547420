"""`compare`: every method reads the same text on the same model, and is measured doing it."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.errors import ArgumentError
from regard.methods import parse
from regard.sites import Method
from regard.study import subject
from regard.study.defaults import default_methods
from regard.study.experiment import Experiment
from regard.study.machine import Machine
from regard.study.progress import Progress
from regard.study.records import Comparison, Settings

_LONGEST_QUESTION = 64  # tokens a passkey question with its answer may take after the context


def compare(
    model: str | Path | tuple[nn.Module, Any] = "smollm2",
    methods: str | Sequence[str | Method] | None = None,
    *,
    text: str | Path | None = None,
    context: int = 2048,
    continuation: int = 64,
    generate: int = 64,
    passkeys: int = 8,
    repeats: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Measure quality, memory, time and attention pattern of methods on a language model.

        comparison = regard.compare("smollm2", "h2o(budget=0.1), streaming-llm", context=1024)
        comparison.report("report.html")

    Every method, and first the untouched model ("dense"), reads the first `context` tokens of the text in one forward
    and then goes on token by token, so that cache policies do what they do in use.

    Args:
        model: a name or path as `regard.study.models.load` takes it, or a loaded (model, tokenizer).
        methods: methods, their names, or a string like ``"h2o, xkv(rank_k=64)"``; `default_methods` if None.
        text: the text itself, or the `Path` of a file; English prose from Python's manual if None.
        context: tokens of the prompt.
        continuation: tokens of the text after it, of which the perplexity is taken.
        generate: tokens dense generates, half after the context and half after the continuation, to be compared with.
        passkeys: numbers to hide in the text and ask for; 0 for none.
        repeats: how often to take each method's times; more are steadier.
        seed: draws the passkeys.
        device, dtype: where and as what to load the model; a model that is loaded stays as it is.
        on_progress: called after each forward.

    Raises:
        ArgumentError: unknown names, sizes that make no sense, text that is too short or cannot be read, or a context
            that the model cannot hold.
        MissingExtra: an optional package is needed and not there.
    """
    for argument, value, least in (
        ("context", context, 1),
        ("continuation", continuation, 1),
        ("generate", generate, 2),
        ("passkeys", passkeys, 0),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ArgumentError(f"{argument} must be at least {least}, got {value}")
    started = time.perf_counter()
    chosen = _methods(methods, context)
    source, content = subject.source(text)
    network, tokenizer = subject.network(model, device, dtype)
    _check_length(network, context + max(continuation + generate - generate // 2, _LONGEST_QUESTION if passkeys else 0))
    weights = next(network.parameters())
    settings = Settings(
        model=str(model) if isinstance(model, str | Path) else subject.name_of(network),
        parameters=sum(p.numel() for p in network.parameters()),
        text=source,
        context=context,
        continuation=continuation,
        generate=generate,
        passkeys=passkeys,
        seed=seed,
        repeats=repeats,
        device=str(weights.device),
        dtype=str(weights.dtype).removeprefix("torch."),
    )
    with subject.evaluating(network), torch.inference_mode():
        results, clock = Experiment(network, tokenizer, content, settings, on_progress).run(chosen)
    return Comparison(
        settings=settings,
        machine=Machine.here(weights.device),
        results=results,
        clock=clock,
        seconds=time.perf_counter() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _methods(methods: str | Sequence[str | Method] | None, context: int) -> list[Method]:
    if methods is None:
        return default_methods(context)
    if isinstance(methods, str):
        return parse(methods)
    chosen: list[Method] = []
    for method in methods:
        if not isinstance(method, str | Method):
            raise ArgumentError(f"methods must be methods or their names, got {type(method).__name__}: {method!r}")
        chosen += parse(method) if isinstance(method, str) else [method]
    return chosen


def _check_length(model: Any, needed: int) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise ArgumentError(
            f"context and what follows it take {needed} tokens, but the model reads at most {limit}; "
            "use a shorter context"
        )
