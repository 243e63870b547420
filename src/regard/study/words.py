"""Figures in words, the same in the terminal and on the page."""

from regard.study.records import Comparison, Result

MISSING = "–"
_MIB = 2**20


def number(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def change(value: float | None) -> str:
    if value is None:
        return MISSING
    return ("+" if value >= 0 else "−") + number(abs(value))


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


def size(value: float | None) -> str:
    """Bytes, in MiB or, where that would be less than one, in KiB."""
    if value is None:
        return MISSING
    return f"{value / _MIB:,.1f} MiB" if value >= _MIB else f"{value / 2**10:,.1f} KiB"


def share(part: float | None, whole: float | None) -> str:
    return MISSING if part is None or not whole else f"{part / whole:.0%}"


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def recalled(result: Result) -> str:
    return f"{result.recalled}/{len(result.recalls)}" if result.recalls else MISSING


def arguments(result: Result) -> str:
    """The method's settings without its name."""
    return result.method.removeprefix(result.name).removeprefix("(").removesuffix(")")


def spread(values: list[float]) -> str:
    """Lowest and highest of several times."""
    low, high = seconds(min(values)), seconds(max(values))
    return low if len(values) == 1 else f"{low} to {high}"


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know to read the figures."""
    dense, s, clock = comparison.dense, comparison.settings, comparison.clock
    lines = [
        f"perplexity of the next {s.continuation} tokens of the text; agreement with dense on {s.generate} tokens it "
        "generates; memory and times as measured.",
        f"1.00× is dense, timed {len(clock.prefill_seconds)} times in between: prefill "
        f"{spread(clock.prefill_seconds)}, decode {spread(clock.decode_seconds)} per token.",
    ]
    if dense.recalls and dense.recalled < len(dense.recalls):
        lines.append(
            f"dense itself recalls {dense.recalled} of {len(dense.recalls)} passkeys at this length; "
            "those it misses say nothing about a method."
        )
    return lines
