"""DHSA on pretrained models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.dhsa.attention import DHSAConfig, attend_blocks, pairs
from regard.methods.language.dhsa.boundaries import predict_boundaries, uniform_boundaries
from regard.methods.language.dhsa.predictor import BoundaryPredictor
from regard.methods.language.dhsa.weights import load_predictor
from regard.sites import Call, Method, Site


@dataclass(kw_only=True)
class DHSA(Method):
    """Read the prompt sparsely: every block of queries attends to the chunks of keys that match it best.

    Only the prompt is sparse, as published: single tokens and pieces that continue a cache attend to everything, and
    so do the last `instruction_tokens` of the prompt. Nothing is dropped from the cache. A layer that slides a window
    of its own chooses inside it.

    Values of later tokens never reach earlier ones, but choices look ahead, as published: chunks are cut in the whole
    prompt, and a chunk that reaches beyond a block of queries is summarised whole.

    Args:
        budget: keys each block of queries attends to: up to 1 a share of the prompt, above 1 a number of tokens.
        block_size: queries that choose together.
        pooling: how queries and keys are summarised, see `DHSAConfig`.
        global_tokens: first keys that every block sees.
        local_tokens: latest keys that every block sees, counted from the block's end.
        instruction_tokens: last queries of the prompt, which attend to everything.
        chunk_size: mean number of tokens per chunk of keys.
        predictor: what cuts the chunks, a boundary predictor or the path of one saved by `save_predictor`; by default
            chunks have equal lengths. The authors publish no weights, and on SmolLM2 even the boundaries the model's
            own attention labels (`label_boundaries`) read no better than equal chunks, so none ships with regard;
            `train_predictor` makes one (benchmarks/dhsa_boundaries.py does, and shows the comparison).
        nms_window_size: least distance between predicted boundaries, exclusive.
        share_boundaries: cut chunks in the first layer only and use them in all; else every layer cuts its own.
        dedupe: attend to every key once; False reproduces the published lists, see `DHSAConfig`.
    """

    name: ClassVar[str] = "dhsa"
    budget: float = 0.25
    block_size: int = 64
    pooling: str = "avgpool_norm"
    global_tokens: int = 64
    local_tokens: int = 128
    instruction_tokens: int = 64
    chunk_size: int = 16
    predictor: str | BoundaryPredictor | None = None
    nms_window_size: int = 8
    share_boundaries: bool = True
    dedupe: bool = True

    def __post_init__(self) -> None:
        if self.budget <= 0 or (self.budget > 1 and self.budget != int(self.budget)):
            raise ArgumentError(f"budget must be a share up to 1 or a whole number of tokens, got {self.budget}")
        if self.chunk_size < 1:
            raise ArgumentError(f"chunk_size must be at least 1, got {self.chunk_size}")
        self._config(length=1)

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        self._first = min((site.index for site in sites if self.acts_on(site)), default=None)
        self._boundaries: list[list[int]] = []
        self._predictor = load_predictor(self.predictor) if isinstance(self.predictor, str) else self.predictor

    def attend(self, call: Call) -> Tensor:
        length = call.query.shape[2]
        if call.past or length <= self.instruction_tokens:
            return attention(call.query, call.key, call.payload, mask=call.mask, bias=call.bias, scale=call.scale)
        if call.bias is not None or call.mask is None:
            raise Unsupported(f"{self.name} reads prompts of causal models; the mask given is additive or allows all")
        starts = [0] * len(call.query) if call.step.valid is None else _left_padding(call.step.valid)
        if call.site.index == self._first or not self.share_boundaries:
            self._boundaries = [self._cut(key[None, :, start:]) for key, start in zip(call.key, starts, strict=True)]
        if not any(starts):
            allowed, config = pairs(call.mask), self._config(length)
            return attend_blocks(
                call.query, call.key, call.payload, self._boundaries, config, call.site.window, allowed, call.scale
            )[0]
        out = call.payload.new_zeros(*call.query.shape[:3], call.payload.shape[-1])
        for item, start in enumerate(starts):  # chunks and blocks are counted from the first real token
            tokens = (slice(item, item + 1), slice(None), slice(start, None))
            out[tokens], _ = attend_blocks(
                call.query[tokens], call.key[tokens], call.payload[tokens], self._boundaries[item : item + 1],
                self._config(length - start), call.site.window, pairs(call.mask, item, start), call.scale,
            )  # fmt: skip
        return out

    def _config(self, length: int) -> DHSAConfig:
        budget = -(-length * self.budget // 1) if self.budget <= 1 else self.budget
        return DHSAConfig(
            self.block_size,
            int(budget),
            self.pooling,
            self.global_tokens,
            self.local_tokens,
            self.instruction_tokens,
            self.dedupe,
        )

    def _cut(self, key: Tensor) -> list[int]:
        """Boundaries of the chunks of rotated keys (1, Hk, L, D)."""
        length = key.shape[2]
        if self._predictor is None or length <= self.instruction_tokens:
            return uniform_boundaries(length, self.chunk_size)
        self._predictor.to(key.device)
        found, _ = predict_boundaries(
            self._predictor,
            key,
            max(1, length // self.chunk_size),
            nms_window_size=self.nms_window_size,
            instruction_tokens=self.instruction_tokens or None,
        )
        return found[0]


def _left_padding(valid: Tensor) -> Sequence[int]:
    """Slot of the first real token of every batch item, given which slots are real (B, N)."""
    starts = valid.int().argmax(-1)
    if bool((valid != (torch.arange(valid.shape[1], device=valid.device) >= starts[:, None])).any()):
        raise Unsupported("dhsa reads prompts that are padded on the left; this batch has padding elsewhere")
    return starts.tolist()
