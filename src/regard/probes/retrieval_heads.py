"""Retrieval heads (arXiv:2404.15574): which heads of a language model copy facts out of a long context.

A head copies in a decoding step when one of the k keys it looks at most lies in the needle and is the very token the
model then says. Its score of one run is the number of such steps over the needle's tokens; its score is the mean over
the runs in which the model answered right.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from regard.attention.statistics import statistics
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.sites import Call, Method, Site, apply

Head = tuple[int, int]


class NeedleRun(Protocol):
    """What `detect_retrieval_heads` asks of a run; `regard.tasks.NeedleRun` is one."""

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def span(self) -> tuple[int, int]: ...

    def recall(self, response: str) -> float: ...


def find_needle(prompt_ids: Sequence[int], needle_ids: Sequence[int], overlap: float = 0.9) -> tuple[int, int]:
    """The first window as long as the needle that has more than ``overlap`` of its distinct tokens; else (-1, -1).

    Order does not count, so the window may begin a little before the needle does.
    """
    if not len(needle_ids):
        raise ArgumentError("needle_ids: expected some tokens, got none")
    prompt, wanted, m = [int(i) for i in prompt_ids], {int(i) for i in needle_ids}, len(needle_ids)
    for i in range(len(prompt)):
        if len(wanted.intersection(prompt[i : i + m])) / len(wanted) > overlap:
            return i, i + m
    return -1, -1


class RetrievalScore:
    """Scores of one run, step by step.

        score = RetrievalScore(layers=30, heads=9, needle_span=(411, 424), prompt_ids=prompt)
        score.update(outputs.attentions, outputs.logits[0, -1].argmax())      # after each decoding step
        score.result()

    Args:
        layers, heads: how many.
        needle_span: first and one past the last token of the needle in the prompt.
        prompt_ids: tokens of the prompt, all of them.
        topk: a head looks at its `topk` largest weights.
        unique: count every distinct token of the needle once (the paper's formula, at most 1) and not every step (the
            published code: a token said twice counts twice).

    Raises:
        ArgumentError: an empty or impossible span, or topk below 1.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        needle_span: tuple[int, int],
        prompt_ids: Sequence[int] | Tensor,
        topk: int = 1,
        *,
        unique: bool = False,
    ) -> None:
        self._start, self._stop = (int(i) for i in needle_span)
        self._prompt = torch.as_tensor(prompt_ids).long().cpu()
        if not 0 <= self._start < self._stop <= len(self._prompt):
            raise ArgumentError(f"needle_span: expected one inside {len(self._prompt)} tokens, got {needle_span}")
        if topk < 1:
            raise ArgumentError(f"topk must be at least 1, got {topk}")
        self.topk, self._unique = topk, unique
        needle = self._prompt[self._start : self._stop]
        self._size = len(needle.unique()) if unique else len(needle)
        self._hits = torch.zeros(layers, heads, dtype=torch.long)
        self._said: set[int] = set()
        self._seen: dict[int, Tensor] = {}

    def update(self, attentions: Sequence[Tensor], token_id: int | Tensor) -> None:
        """Count one step.

        Args:
            attentions: by layer, weights (1, H, 1, N) of the query that chose the token.
            token_id: the token that was chosen.

        Raises:
            ShapeError: not as many layers and heads as announced.
        """
        if len(attentions) != len(self._hits):
            raise ShapeError(f"attentions: expected {len(self._hits)} layers, got {len(attentions)}")
        rows = [layer[0, :, -1] for layer in attentions]
        self.update_keys(torch.stack([row.topk(min(self.topk, row.shape[-1])).indices for row in rows]), token_id)

    def update_keys(self, keys: Tensor, token_id: int | Tensor) -> None:
        """Count one step, given the positions (L, H, k) that the heads look at most."""
        if keys.shape[:2] != self._hits.shape:
            raise ShapeError(f"keys: expected (L, H) = {tuple(self._hits.shape)} in front, got {tuple(keys.shape)}")
        keys, token = keys.cpu(), int(token_id)
        inside = (keys >= self._start) & (keys < self._stop)
        hit = (inside & (self._prompt[keys.clamp(max=len(self._prompt) - 1)] == token)).any(-1)
        if self._unique:
            before = self._seen.get(token, torch.zeros_like(hit))
            self._seen[token] = before | hit
            hit = hit & ~before
        self._hits += hit

    def result(self) -> Tensor:
        """(L, H), in float32."""
        return self._hits / self._size


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What `detect_retrieval_heads` found.

    Attributes:
        scores: (R, L, H), of the runs that counted.
        recalls: of all runs, the answer's recall.
        kept: for each run, whether it counted.
        responses: of all runs.
        threshold: mean score from which a head is a retrieval head.
    """

    scores: Tensor
    recalls: tuple[float, ...]
    kept: tuple[bool, ...]
    responses: tuple[str, ...]
    threshold: float

    @property
    def mean(self) -> Tensor:
        """(L, H), mean over the runs that counted.

        Raises:
            ArgumentError: none did.
        """
        if not len(self.scores):
            raise ArgumentError("no run counted: the model answered none right, so its heads have no score")
        return self.scores.mean(0)

    @property
    def counts(self) -> Tensor:
        """(L, H), in how many of them the head copied anything."""
        return (self.scores > 0).sum(0)

    def ranking(self) -> list[Head]:
        """All heads as (layer, head), the best first; equal ones by index."""
        heads = self.scores.shape[-1]
        order = self.mean.flatten().sort(descending=True, stable=True).indices
        return [divmod(i, heads) for i in order.tolist()]

    def retrieval_heads(self) -> list[Head]:
        """Those whose mean reaches the threshold, the best first."""
        mean = self.mean
        return [head for head in self.ranking() if mean[head] >= self.threshold]

    def random_heads(self, count: int, outside: int, seed: int = 0) -> list[Head]:
        """The control: some heads that are not among the `outside` best.

        Raises:
            ArgumentError: there are not so many.
        """
        rest = self.ranking()[outside:]
        if count > len(rest):
            raise ArgumentError(f"count: {len(rest)} heads are not among the {outside} best, got {count}")
        chosen = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:count]
        return [rest[i] for i in chosen.tolist()]


@dataclass(kw_only=True)
class TopKeys(Method):
    """Remember where every head looks most, one decoded token at a time: O(H·N) per layer and token.

    Prompts go by unread; `keys` holds the latest token's.

    Args:
        topk: so many keys.
    """

    name: ClassVar[str] = "top-keys"
    topk: int = 1

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ArgumentError(f"topk must be at least 1, got {self.topk}")
        #: by layer, the positions (B, H, k), the most looked at first
        self.keys: dict[int, Tensor] = {}

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        self.keys = {}

    def after(self, call: Call) -> None:
        if call.past == 0 or call.is_prefill:
            return
        assert call.step.positions is not None  # every call inside `regard.apply` has them
        m = call.key.shape[2]
        if int(call.step.positions.max()) >= m:
            raise Unsupported(f"top keys where keys were dropped: {call.site.name} holds {m}")
        found = statistics(
            call.query, call.key, mask=call.mask, bias=call.bias, scale=call.scale, top=[0], top_k=self.topk
        )
        self.keys[call.site.index] = found.top_keys[:, :, 0]


def detect_retrieval_heads(
    model: nn.Module,
    tokenizer: Any,
    runs: Sequence[NeedleRun],
    threshold: float = 0.1,
    *,
    topk: int = 1,
    unique: bool = False,
    min_recall: float = 0.5,
    max_new_tokens: int = 50,
    methods: Sequence[Method] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Score every head on needle-in-a-haystack runs.

    Each prompt is read by whatever kernel is fast; then tokens are chosen greedily until a newline, the end of the
    text or `max_new_tokens`, and only their single rows of weights are looked at. There are no further forwards.

        runs = [needle_run(tokenizer, english(), needle, 1000, depth) for needle in needles for depth in (0.2, 0.8)]
        found = detect_retrieval_heads(model, tokenizer, runs)
        with regard.apply(model, MaskHeads(targets=found.ranking()[:10])): ...

    Args:
        model, tokenizer: a causal language model of transformers, and what decodes its tokens.
        runs: see `regard.tasks.needle_run`.
        threshold: see `HeadScores`.
        topk, unique: see `RetrievalScore`.
        min_recall: a run counts when the response's recall of the answer is greater.
        max_new_tokens: of a response, at most.
        methods: applied while it runs.
        on_progress: called with runs done and their number.

    Raises:
        ArgumentError: no runs, or a prompt of fewer than two tokens.
        Unsupported: attention that cannot be reached, or keys that were dropped.
    """
    if not runs:
        raise ArgumentError("runs: expected at least one")
    scores, recalls, responses = [], [], []
    watch = TopKeys(topk=topk)
    with apply(model, [*methods, watch]):
        for done, run in enumerate(runs, 1):
            score, said = None, []
            for token in greedy(model, tokenizer, run.prompt, max_new_tokens):
                keys = torch.stack([top[0].cpu() for _, top in sorted(watch.keys.items())])
                layers, heads, _ = keys.shape
                score = score or RetrievalScore(layers, heads, run.span, run.prompt, topk, unique=unique)
                score.update_keys(keys, token)
                said.append(token)
            assert score is not None  # one token is always decoded
            responses.append(tokenizer.decode(said, skip_special_tokens=True).strip())
            recalls.append(run.recall(responses[-1]))
            scores.append(score.result())
            if on_progress is not None:
                on_progress(done, len(runs))
    kept = tuple(recall > min_recall for recall in recalls)
    return HeadScores(torch.stack(scores)[list(kept)], tuple(recalls), kept, tuple(responses), threshold)


def greedy(
    model: nn.Module, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, cache: Any = None
) -> Iterator[int]:
    """The tokens a model says after a prompt, the most likely each time, as they come.

    All of the prompt but its last token is read at once; that one is the first decoding step. The last token given
    holds a newline or ends the text, or is number `max_new_tokens`.

    Args:
        cache: of ``prompt[:-1]``, read before; it grows.

    Raises:
        ArgumentError: the prompt has fewer than two tokens, or max_new_tokens is below 1.
    """
    if len(prompt) < 2 or max_new_tokens < 1:
        raise ArgumentError(
            f"prompt: expected two tokens or more and room for one, got {len(prompt)}, {max_new_tokens}"
        )
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    if cache is None:
        cache = read(model, ids[:, :-1])
    token = ids[:, -1:]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        yield int(token)
        if int(token) == tokenizer.eos_token_id or "\n" in tokenizer.decode([int(token)]):
            return


def read(model: nn.Module, ids: Tensor) -> Any:
    """The cache after reading (B, N) tokens; no logits are computed."""
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids, use_cache=True).past_key_values  # type: ignore[operator]
