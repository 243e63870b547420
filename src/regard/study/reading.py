"""A model that reads a prompt and goes on token by token, as it does in use, on the clock."""

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Reading:
    """Where a model stands in a text.

    Attributes:
        cache: its transformers cache.
        logits: (vocabulary,) of the next token.
        seconds: what each forward so far took, the prompt's first.
    """

    cache: Any
    logits: Tensor
    seconds: list[float] = field(default_factory=list)

    def copy(self) -> "Reading":
        """An independent copy, to go on from here more than once."""
        return Reading(copy.deepcopy(self.cache), self.logits, list(self.seconds))


class Reader:
    """Runs a causal language model.

    Args:
        model: a transformers model in eval mode.
        on_tokens: called with the number of tokens after each forward.
    """

    def __init__(self, model: nn.Module, on_tokens: Callable[[int], None] = lambda count: None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._on_tokens = on_tokens
        # without it a model computes logits for the whole prompt, which takes more memory than its cache
        takes_it = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes_it else {}

    def read(self, tokens: Sequence[int]) -> Reading:
        """Read a prompt in one forward, into a new cache."""
        return self._forward(tokens, None)

    def step(self, reading: Reading, token: int) -> None:
        """Feed one more token; `reading` moves on."""
        after = self._forward([token], reading.cache)
        reading.cache, reading.logits = after.cache, after.logits
        reading.seconds += after.seconds

    def follow(self, reading: Reading, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Feed `tokens` one by one, and yield the logits (vocabulary,) from before each of them."""
        for token in tokens:
            yield reading.logits
            self.step(reading, token)

    def greedy(self, reading: Reading, count: int) -> list[int]:
        """The model's own most likely continuation of `count` tokens."""
        tokens = []
        for _ in range(count):
            tokens.append(int(reading.logits.argmax()))
            self.step(reading, tokens[-1])
        return tokens

    def recalls(self, reading: Reading, question: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether the model goes on with `answer`, token for token, when asked `question`; stops when it does not."""
        for token in question:
            self.step(reading, token)
        for i, token in enumerate(answer):
            if int(reading.logits.argmax()) != token:
                return False
            if i + 1 < len(answer):
                self.step(reading, token)
        return True

    def _forward(self, tokens: Sequence[int], cache: Any) -> Reading:
        ids = torch.tensor([tokens], device=self.device)
        self._wait()
        start = time.perf_counter()
        out = self.model(ids, past_key_values=cache, use_cache=True, **self._last_only)
        self._wait()
        seconds = time.perf_counter() - start
        self._on_tokens(len(tokens))
        return Reading(out.past_key_values, out.logits[0, -1].clone(), [seconds])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
