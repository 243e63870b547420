"""The measurements of a comparison, method by method."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import fields
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from regard.cache import nbytes
from regard.errors import ArgumentError, Unsupported
from regard.probes import PatternProbe
from regard.sites import Method, apply, find_sites
from regard.study.memory import PeakMemory
from regard.study.progress import Plan, Progress, units
from regard.study.reading import Reader, Reading
from regard.study.records import Clock, Picture, Recall, Result, Settings
from regard.tasks import PasskeyTask, agreement, negative_log_likelihood, passkey_task, perplexity, tokenize
from regard.tasks.text import opening

DENSE = "dense"
_CHECK_TOKENS = 16  # read under every method before anything is measured, to find what cannot work
_WARM_UP_TOKENS = 256
_CLOCK_STEPS = 12  # tokens decoded for each timing of dense
_SHOWN = 2  # settings that are shown beside a method's name even if they are its defaults
_BINS = 64  # of a picture
_PICTURED_DEPTHS = (1 / 6, 1 / 2, 5 / 6)  # of the layers
_PICTURED_STEPS = 16  # tokens decoded for the pictures when no passkeys are asked for


class Experiment:
    """One model, one text and one set of tasks, for any methods.

    Args:
        model: in eval mode. tokenizer: its tokenizer. text: long enough for context and continuation.
        settings: the sizes of the tasks.
        on_progress: called after each forward.

    Raises:
        ArgumentError: the text is too short.
        Unsupported: the model's attention cannot be adapted.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str,
        settings: Settings,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._on_progress = on_progress
        self._reader = Reader(model, lambda tokens: self._plan.advance(tokens))
        context, continuation = settings.context, settings.continuation
        start = opening(tokenizer)
        tokens = [*start, *tokenize(tokenizer, text, context + continuation - len(start))]
        if len(tokens) < context + continuation:
            raise ArgumentError(
                f"text has {len(tokens)} tokens, expected at least {context + continuation}, "
                f"context {context} + continuation {continuation}; use a longer text or a shorter context"
            )
        self._prompt, self._next = tokens[:context], tokens[context:]
        self._passkeys: PasskeyTask | None = None
        if settings.passkeys:
            self._passkeys = passkey_task(tokenizer, text, context, settings.passkeys, settings.seed)
        self._pictured = _pictured_layers(model)
        #: dense's own tokens after the context and after the continuation, filled when dense runs
        self._own: list[list[int]] = []

    def run(self, methods: Sequence[Method]) -> tuple[list[Result], Clock]:
        """Dense first, then every method, with dense timed again after each."""
        gc.collect()
        gc.freeze()  # the meters collect garbage often; what is there now need not be looked through every time
        try:
            return self._run(methods)
        finally:
            gc.unfreeze()

    def _run(self, methods: Sequence[Method]) -> tuple[list[Result], Clock]:
        self._plan = Plan(self._units(len(methods)), self._on_progress)
        results = [Result(DENSE, DENSE), *(_result(method) for method in methods)]
        self._plan.stage(DENSE, "warm-up", self._units_of_check(len(methods)))
        self._check(methods, results[1:])
        prefill, decode = self._measure([], results[0])
        clock = Clock([prefill], [decode])
        self._recall([], results[0])
        for method, result in zip(methods, results[1:], strict=True):
            if result.error is None:
                try:
                    self._time([method], result, clock)
                    self._recall([method], result)
                except Unsupported as error:
                    result.error = str(error)
        self._plan.stage(DENSE, "done", 0)
        _refer_to_dense(results, clock)
        return results, clock

    # --- stages -------------------------------------------------------------------------------------------------

    def _check(self, methods: Sequence[Method], results: Sequence[Result]) -> None:
        """Wake the model up, and see early which methods cannot run on it."""
        self._reader.read(self._prompt[:_WARM_UP_TOKENS])
        for method, result in zip(methods, results, strict=True):
            try:
                with apply(self.model, method):
                    reading = self._reader.read(self._prompt[:_CHECK_TOKENS])
                    self._reader.step(reading, self._next[0])
            except Unsupported as error:
                result.error = str(error)

    def _time(self, methods: list[Method], result: Result, clock: Clock) -> None:
        """Measure a method; its times, against those of dense before and after, as often as asked for."""
        taken = []
        for repeat in range(self.settings.repeats):
            if repeat == 0:
                prefill, decode = self._measure(methods, result)
            else:
                prefill, decode = self._clock(methods, result.name)
            for times, seconds in zip((clock.prefill_seconds, clock.decode_seconds), self._clock([]), strict=True):
                times.append(seconds)
            before_and_after = fmean(clock.prefill_seconds[-2:]), fmean(clock.decode_seconds[-2:])
            taken.append((prefill, decode, prefill / before_and_after[0], decode / before_and_after[1]))
        result.prefill_seconds, result.decode_seconds, result.prefill_ratio, result.decode_ratio = map(
            median, zip(*taken, strict=True)
        )

    def _measure(self, methods: list[Method], result: Result) -> tuple[float, float]:
        """Perplexity, agreement, cache and peak memory; returns seconds of the prefill and of a decoded token."""
        half = self.settings.generate // 2
        self._plan.stage(result.name, "reading and continuing", self._units_of_measure())
        meter = PeakMemory(self._reader.device)
        with apply(self.model, methods):
            with meter:
                reading = self._reader.read(self._prompt)
            result.cache_bytes = nbytes(reading.cache)
            first = self._choices(reading.copy(), 0, half)
            with meter:
                losses = [
                    float(negative_log_likelihood(logits, torch.tensor(token, device=logits.device)))
                    for token, logits in zip(self._next, self._reader.follow(reading, self._next), strict=True)
                ]
            decode = median(reading.seconds[1:])
            second = self._choices(reading, 1, self.settings.generate - half)
        result.peak_bytes = meter.bytes
        result.loss, result.perplexity = fmean(losses), perplexity(losses)
        result.agreement = agreement(first + second, self._own[0] + self._own[1])
        return reading.seconds[0], decode

    def _choices(self, reading: Reading, which: int, count: int) -> list[int]:
        """The tokens a method prefers along dense's own continuation; dense, which runs first, makes that one."""
        if which == len(self._own):
            self._own.append(self._reader.greedy(reading, count))
            return self._own[which]
        return [int(logits.argmax()) for logits in self._reader.follow(reading, self._own[which])]

    def _clock(self, methods: list[Method], name: str = DENSE) -> tuple[float, float]:
        """Only the times: seconds of the prefill and of a decoded token."""
        self._plan.stage(name, "timing", self._units_of_clock())
        with (
            apply(self.model, methods),
            PeakMemory(self._reader.device),
        ):  # the meter levels the ground, as it does there
            reading = self._reader.read(self._prompt)
            for token in self._next[:_CLOCK_STEPS]:
                self._reader.step(reading, token)
        return reading.seconds[0], median(reading.seconds[1:])

    def _recall(self, methods: list[Method], result: Result) -> None:
        """Ask for every passkey, from copies of one reading, and picture where one of the questions looks."""
        if self._passkeys is None:
            self._picture(methods, result)
            return
        passkeys, prefix = self._passkeys.passkeys, self._passkeys.prefix
        self._plan.stage(result.name, "passkeys", self._units_of_recall())
        probe = PatternProbe(bins=_BINS, layers=self._pictured)
        with apply(self.model, [*methods, probe]):
            reading = self._reader.read(self._passkeys.haystack)
            for token in prefix:
                self._reader.step(reading, token)
            for i, passkey in enumerate(passkeys):
                before = _steps(probe)
                correct = self._reader.recalls(reading.copy(), passkey.question[len(prefix) :], passkey.answer)
                result.recalls.append(Recall(passkey.name, passkey.depth, correct))
                if i == len(passkeys) // 3:  # far enough back to be dropped by what keeps the latest
                    rows = [*range(len(prefix)), *range(before, _steps(probe))]
                    tokens = passkey.question + passkey.answer
                    result.pictures = self._pictures(probe, rows, tokens, passkey.start)

    def _picture(self, methods: list[Method], result: Result) -> None:
        """Picture where the text after the prompt looks."""
        self._plan.stage(result.name, "pictures", self._units_of_recall())
        probe = PatternProbe(bins=_BINS, layers=self._pictured)
        tokens = self._next[:_PICTURED_STEPS]
        with apply(self.model, [*methods, probe]):
            reading = self._reader.read(self._prompt)
            for token in tokens:
                self._reader.step(reading, token)
        result.pictures = self._pictures(probe, list(range(len(tokens))), tokens, None)

    def _pictures(
        self, probe: PatternProbe, rows: list[int], tokens: Sequence[int], target: int | None
    ) -> list[Picture]:
        """The record of `probe`, with the decoded `rows`, to which `tokens` belong as far as there are rows."""
        shown = [self.tokenizer.decode([token]) for token in tokens[: len(rows)]]
        return [
            Picture(
                layer=layer,
                edges=pattern.edges,
                prompt=_mean_over_heads(pattern.prompt),
                decoded=[_mean_over_heads(pattern.decoded[row]) for row in rows],
                tokens=shown,
                target=target,
            )
            for layer, pattern in sorted(probe.patterns.items())
        ]

    # --- how much work that is ----------------------------------------------------------------------------------

    def _units(self, num_methods: int) -> float:
        per_method = self._units_of_measure() + self._units_of_recall()
        timing = self._units_of_clock() * (2 * self.settings.repeats - 1)
        return self._units_of_check(num_methods) + per_method + num_methods * (per_method + timing)

    def _units_of_check(self, num_methods: int) -> float:
        return units(min(_WARM_UP_TOKENS, len(self._prompt))) + num_methods * units(_CHECK_TOKENS, 1)

    def _units_of_measure(self) -> float:
        return units(len(self._prompt), self.settings.continuation + self.settings.generate)

    def _units_of_clock(self) -> float:
        return units(len(self._prompt), min(_CLOCK_STEPS, len(self._next)))

    def _units_of_recall(self) -> float:
        if self._passkeys is None:
            return units(len(self._prompt), min(_PICTURED_STEPS, len(self._next)))
        prefix = len(self._passkeys.prefix)
        asked = sum(len(p.question) - prefix + len(p.answer) for p in self._passkeys.passkeys)
        return units(len(self._passkeys.haystack), prefix + asked)


def _result(method: Method) -> Result:
    parameters = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    changed = [f.name for f in fields(method) if f.init and parameters[f.name] != f.default]
    numbers = [name for name, value in parameters.items() if type(value) in (int, float)][:_SHOWN]
    shown = numbers if set(changed) <= set(numbers) else changed
    arguments = ", ".join(f"{name}={parameters[name]!r}" for name in shown)
    return Result(method.name, f"{method.name}({arguments})" if arguments else method.name, parameters)


def _refer_to_dense(results: list[Result], clock: Clock) -> None:
    """Fill in what is relative to dense, now that all its times are known."""
    dense = results[0]
    dense.prefill_seconds, dense.decode_seconds = median(clock.prefill_seconds), median(clock.decode_seconds)
    dense.prefill_ratio = dense.decode_ratio = 1.0
    for result in results:
        if result.perplexity is not None and dense.perplexity is not None:
            result.perplexity_change = result.perplexity - dense.perplexity


def _pictured_layers(model: nn.Module) -> list[int]:
    """A low, a middle and a high layer, among those that see the full context if there are any."""
    sites = find_sites(model)
    seen = [site.index for site in sites if site.window is None] or [site.index for site in sites]
    return sorted({seen[int(depth * len(seen))] for depth in _PICTURED_DEPTHS})


def _steps(probe: PatternProbe) -> int:
    """Number of decoded tokens the probe has seen."""
    return len(next(iter(probe.patterns.values())).decoded)


def _mean_over_heads(mass: Tensor) -> list[Any]:
    """(1, H, ...) -> nested lists (...)."""
    return mass[0].mean(0).tolist()
