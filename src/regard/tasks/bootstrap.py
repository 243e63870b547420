"""How sure a number is: paired bootstrap over items."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import ArgumentError

#: of resampled series (R, T), one number per resample (R,)
Statistic = Callable[..., Tensor]


@dataclass(frozen=True)
class Bootstrap:
    """A number and what resampling the items makes of it.

    Attributes:
        estimate: of the items as they are.
        low, high: percentile interval; NaN where the statistic is undefined in every resample.
        p_positive, p_negative: share of resamples that are not above (not below) zero: small where the sign is sure.
        undefined: share of resamples in which the statistic is NaN; the others make the interval and the p-values.
    """

    estimate: float
    low: float
    high: float
    p_positive: float
    p_negative: float
    undefined: float = 0.0

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    statistic: Statistic,
    *series: Sequence[float] | Tensor,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Resample the items, the same in all series, and take percentiles of the statistic.

        paired_bootstrap(lambda a, b: a.mean(-1) - b.mean(-1), after, before)

    Args:
        statistic: called with the resampled series (R, T) as float64, returns (R,).
        series: one or more, T numbers each, item by item.
        resamples, level: number of resamples, and what share of them the interval holds.
        seed: of the drawing.

    Raises:
        ArgumentError: no series, different or no items, or resamples or level out of range.
    """
    rows = [torch.as_tensor(s, dtype=torch.float64) for s in series]
    if not rows or any(row.dim() != 1 or len(row) != len(rows[0]) for row in rows) or len(rows[0]) == 0:
        raise ArgumentError(f"series: expected equally many items, at least one, got {[tuple(r.shape) for r in rows]}")
    if resamples < 1 or not 0 < level < 1:
        raise ArgumentError(f"resamples must be at least 1 and level between 0 and 1, got {resamples} and {level}")
    count = len(rows[0])
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(count, (resamples, count), generator=generator)
    drawn = statistic(*(row[index] for row in rows))
    estimate = float(statistic(*(row[None] for row in rows))[0])
    known = drawn[~drawn.isnan()]
    if len(known) == 0:
        return Bootstrap(estimate, torch.nan, torch.nan, torch.nan, torch.nan, undefined=1.0)
    low, high = torch.quantile(known, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    positive, negative = float((known <= 0).double().mean()), float((known >= 0).double().mean())
    return Bootstrap(estimate, low, high, positive, negative, 1 - len(known) / resamples)
