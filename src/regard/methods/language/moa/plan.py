"""A plan: one span rule per layer and key-value head, as it is stored and used."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.masks import Mask
from regard.methods.language.moa.spans import span_mask

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class MoAPlan:
    """``span(N) = alpha + beta · N`` for every layer and key-value head (arXiv:2406.14909).

    A span counts the keys a query may see: the first block of tokens (the sink) and the most recent ones, its own
    included. N is the prompt and what will be generated. What is used is the rule's value, at most N, at least two
    blocks, rounded up to whole blocks.

    Args:
        alphas: (layers)(heads), in tokens; may be negative.
        betas: (layers)(heads), shares of N.
        block_size: tokens per block; 64 in the published kernels.
    """

    alphas: Rows
    betas: Rows
    block_size: int = 64

    def __post_init__(self) -> None:
        heads = [[len(row) for row in rows] for rows in (self.alphas, self.betas)]
        if heads[0] != heads[1] or len(set(heads[0])) != 1:
            raise ArgumentError(
                f"alphas and betas must have the same number of heads in every layer, got {heads[0]} and {heads[1]}"
            )
        if self.block_size < 1:
            raise ArgumentError(f"block_size must be at least 1, got {self.block_size}")
        for name in ("alphas", "betas"):
            rows = tuple(tuple(map(float, row)) for row in getattr(self, name))
            if not all(math.isfinite(value) for row in rows for value in row):
                raise ArgumentError(f"{name} must be finite numbers")
            object.__setattr__(self, name, rows)

    @classmethod
    def uniform(
        cls, num_layers: int, num_heads: int, *, alpha: float = 0.0, beta: float = 0.0, block_size: int = 64
    ) -> "MoAPlan":
        """The same rule everywhere; with ``beta=0`` the window and sink of StreamingLLM."""
        return cls([[alpha] * num_heads] * num_layers, [[beta] * num_heads] * num_layers, block_size)

    # --- what it says -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and key-value heads."""
        return len(self.alphas), len(self.alphas[0])

    def spans(self, prompt_len: int, max_new: int = 0) -> Tensor:
        """(layers, heads) keys per query when ``prompt_len`` tokens are read and up to ``max_new`` generated."""
        length, b = prompt_len + max_new, self.block_size
        if prompt_len < 1 or max_new < 0:
            raise ArgumentError(f"prompt_len must be at least 1 and max_new 0, got {prompt_len} and {max_new}")
        return torch.tensor(
            [
                [
                    math.ceil(max(min(int(alpha + beta * length), length), 2 * b) / b) * b
                    for alpha, beta in zip(*rows, strict=True)
                ]
                for rows in zip(self.alphas, self.betas, strict=True)
            ]
        )

    def sinks(self, prompt_len: int, max_new: int = 0) -> Tensor:
        """(layers, heads) keys of the span that are the first tokens: one block."""
        return self.spans(prompt_len, max_new).clamp(max=self.block_size)

    def mask(self, length: int, num_groups: int = 1) -> list[Mask]:
        """Per layer, the keys that each head's queries see in a text of ``length`` tokens.

        Args:
            num_groups: query heads per key-value head, which share its rule.
        """
        return [
            span_mask(spans, sinks, length, num_groups)
            for spans, sinks in zip(self.spans(length).tolist(), self.sinks(length).tolist(), strict=True)
        ]

    def density(self, length: int) -> float:
        """Mean share of the keys of a text of ``length`` tokens that its last query sees."""
        return self.spans(length).clamp(max=length).double().mean().item() / length

    # --- files --------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path) -> None:
        """Write the plan as published plans are: ``{"alphas": [[...]], "betas": [[...]]}``."""
        content: dict[str, object] = {"alphas": self.alphas, "betas": self.betas}
        if self.block_size != 64:
            content["block_size"] = self.block_size
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "MoAPlan":
        """Read a plan, one of regard's or a published one.

        Raises:
            ArgumentError: the file cannot be read, or holds no plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["alphas"], content["betas"], content.get("block_size", 64))
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"plan: cannot read {str(path)!r}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"plan: {str(path)!r} holds no plan with alphas and betas: {error}") from error
