"""Which of these follows the passage? Multiple choice made from any text, answered by likelihood.

The wrong candidates follow the same token elsewhere in the text, so that the last word alone does not tell.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.tasks.metrics import negative_log_likelihood


@dataclass(frozen=True)
class ContinuationItem:
    """A passage and its candidates, as token ids; ``candidates[answer]`` is what the text goes on with."""

    context: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    answer: int


def continuation_items(
    tokens: Sequence[int], count: int, *, context: int = 48, length: int = 8, choices: int = 4, seed: int = 0
) -> list[ContinuationItem]:
    """Draw `count` items from a tokenized text; their passages do not overlap.

    Args:
        context, length: tokens of the passage and of each candidate.
        choices: number of candidates, one of which is right.
        seed: draws passages, wrong candidates and the place of the right one.

    Raises:
        ArgumentError: a size below 1, fewer than two choices, or a text too short for so many items.
    """
    if min(count, context, length) < 1 or choices < 2:
        raise ArgumentError(
            f"expected count, context and length of at least 1 and two choices, got {count}, {context}, {length} and "
            f"{choices}"
        )
    rng, after = random.Random(seed), defaultdict(list)
    for place in range(len(tokens) - length):
        after[tokens[place]].append(place + 1)
    starts = list(range(0, len(tokens) - context - length + 1, context + length))
    rng.shuffle(starts)
    items: list[ContinuationItem] = []
    for start in starts:
        end = start + context
        right = tuple(tokens[end : end + length])
        elsewhere = {tuple(tokens[p : p + length]) for p in after[tokens[end - 1]] if abs(p - end) > context} - {right}
        if len(elsewhere) < choices - 1:
            continue
        wrong = rng.sample(sorted(elsewhere), choices - 1)
        answer = rng.randrange(choices)
        candidates = (*wrong[:answer], right, *wrong[answer:])
        items.append(ContinuationItem(tuple(tokens[start:end]), candidates, answer))
        if len(items) == count:
            return items
    raise ArgumentError(f"count: a text of {len(tokens)} tokens gives {len(items)} such items, expected {count}")


@torch.no_grad()
def continuation_scores(
    model: Any,
    items: Sequence[ContinuationItem],
    *,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Log-probability per token of each candidate after its passage: (items, choices), nats.

    A passage is read once for all its candidates.

    Args:
        model: a transformers causal language model; methods applied to it see a prompt and then a piece of text.
        items: all of the same sizes, as `continuation_items` gives them.
        batch_size: passages at a time.
        on_progress: called with items done and their number.
    """
    transformers = require("transformers", "score continuations")
    scores = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        contexts = torch.tensor([item.context for item in part])
        candidates = torch.tensor([item.candidates for item in part])
        choices, length = candidates.shape[1:]
        cache = transformers.DynamicCache(config=model.config)
        first = model(contexts, past_key_values=cache, logits_to_keep=1).logits
        losses = [negative_log_likelihood(first.expand(-1, choices, -1), candidates[:, :, 0])[..., None]]
        if length > 1:
            cache.batch_repeat_interleave(choices)
            logits = model(candidates.flatten(0, 1)[:, :-1], past_key_values=cache).logits
            losses.append(negative_log_likelihood(logits, candidates.flatten(0, 1)[:, 1:]).unflatten(0, (-1, choices)))
        scores.append(-torch.cat(losses, -1).mean(-1))
        if on_progress is not None:
            on_progress(start + len(part), len(items))
    return torch.cat(scores)
