"""Which rule for which head: several losses at once, by epsilon constraints.

min over x   ( Σ_h Σ_c x_hc · loss_p[h, c] )  for every profiled length p
such that    Σ_c x_hc = 1        lower_q <= Σ_h Σ_c x_hc · cost_q[h, c] <= bound_q  at every length q
             at most `max_rules_per_layer` different rules among the heads of a layer
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.methods.language.moa.milp import Program

_MOST_CHOICES = 2**22


@dataclass(frozen=True, eq=False)
class Solution:
    """A choice of rules.

    Attributes:
        rules: (heads,) index of each head's rule.
        losses: (P,) total loss at each profiled length.
        costs: (Q,) total cost at each bounded length.
    """

    rules: Tensor
    losses: Tensor
    costs: Tensor


def optimise_plan(
    losses: Tensor,
    costs: Tensor,
    bounds: Sequence[float] | Tensor,
    *,
    heads_per_layer: int = 1,
    max_rules_per_layer: int | None = 2,
    lower_ratio: float | None = 0.9,
    points: int = 5,
    gap: float = 1e-4,
    time_limit: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Solution]:
    """The Pareto-optimal choices of rules under the cost bounds (arXiv:2406.14909), by the sum of their losses.

    Each length's loss is minimised alone, which gives the range of each. Then, for one length after the other, the
    ranges of all others are cut into ``points - 1`` equal intervals, and its loss is minimised in every combination of
    them. What is dominated is dropped. The solver is HiGHS, exact up to ``gap``.

    Args:
        losses: (P, heads, rules), heads layer by layer.
        costs: (Q, heads, rules), or (Q, rules) where all heads cost the same.
        bounds: (Q,) most that the costs of all heads may add up to.
        heads_per_layer: heads that one kernel call serves.
        max_rules_per_layer: different rules among them; None for no limit.
        lower_ratio: spend at least this share of each bound; None for no such constraint.
        points: ends of the intervals.
        gap: relative gap at which the solver stops.
        time_limit: seconds per problem; the best choice found by then counts.
        on_progress: called with the number of problems solved and of all.

    Raises:
        ShapeError: losses, costs and bounds do not fit together.
        ArgumentError: no choice keeps the bounds, or an argument is out of range.
        MissingExtra: scipy is not installed.
    """
    z, d, limit = _checked(losses, costs, bounds)
    count, heads, _ = z.shape
    if heads_per_layer < 1 or heads % heads_per_layer:
        raise ArgumentError(f"heads_per_layer must divide the {heads} heads, got {heads_per_layer}")
    if max_rules_per_layer is not None and max_rules_per_layer < 1:
        raise ArgumentError(f"max_rules_per_layer must be at least 1, got {max_rules_per_layer}")
    if points < 2:
        raise ArgumentError(f"points must be at least 2, got {points}")
    lowest = np.full_like(limit, -np.inf) if lower_ratio is None else limit * lower_ratio
    options = {"mip_rel_gap": gap} | ({} if time_limit is None else {"time_limit": time_limit})
    program = Program(z, d, lowest, limit, heads_per_layer, max_rules_per_layer, options)

    free = np.full(count, np.inf)
    combinations = list(product(range(points - 1), repeat=count - 1)) if count > 1 else []
    total = count * (1 + len(combinations))
    choices: list[np.ndarray] = []

    def solve(objective: int, least: np.ndarray, most: np.ndarray, number: int) -> None:
        choice = program.solve(objective, least, most)
        if choice is not None:
            choices.append(choice)
        if on_progress is not None:
            on_progress(number, total)

    for p in range(count):
        solve(p, -free, free, p + 1)
        if len(choices) <= p:
            raise ArgumentError(
                f"bounds: no choice of rules costs from {lowest.tolist()} to {limit.tolist()} in all; "
                "change the bounds or lower_ratio, offer other rules, or give it more time than time_limit"
            )
    reached = np.array([program.total(choice) for choice in choices])
    edges = np.linspace(reached.min(0), reached.max(0), points)
    for number, (p, at) in enumerate(product(range(count), combinations), count + 1):
        others = [other for other in range(count) if other != p]
        least, most = -free, free.copy()
        least[others], most[others] = edges[list(at), others], edges[[i + 1 for i in at], others]
        solve(p, least, most, number)
    distinct = {tuple(choice.tolist()): program.total(choice) for choice in choices}
    found = [
        _solution(rules, losses, costs)
        for rules, value in distinct.items()
        if not any((other <= value).all() and (other < value).any() for other in distinct.values())
    ]
    return sorted(found, key=lambda solution: solution.losses.sum().item())


def best_plan(losses: Tensor, costs: Tensor, bounds: Sequence[float] | Tensor) -> Solution:
    """The choice with the least sum of losses within the bounds, by trying all; ties go to the lowest indices.

    Args:
        losses, costs, bounds: as in `optimise_plan`.

    Raises:
        ShapeError, ArgumentError: as there, and where there are too many choices to try.
    """
    z, d, limit = _checked(losses, costs, bounds)
    _, heads, rules = z.shape
    if rules**heads > _MOST_CHOICES:
        raise ArgumentError(f"losses: {rules}^{heads} choices are too many to try; use optimise_plan")
    choices = np.stack(np.unravel_index(np.arange(rules**heads), (rules,) * heads), axis=1)
    spent = d[:, np.arange(heads), choices].sum(-1)
    total = z[:, np.arange(heads), choices].sum((0, 2))
    allowed = (spent <= limit[:, None] * (1 + 1e-9)).all(0)
    if not allowed.any():
        raise ArgumentError(f"bounds: no choice of rules costs at most {limit.tolist()}")
    return _solution(choices[np.where(allowed, total, np.inf).argmin()].tolist(), losses, costs)


def _checked(
    losses: Tensor, costs: Tensor, bounds: Sequence[float] | Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses (P, H, C), costs (Q, H, C) and bounds (Q,) in float64."""
    if losses.ndim != 3 or losses.numel() == 0:
        raise ShapeError(f"losses: expected (lengths, heads, rules), got {tuple(losses.shape)}")
    if costs.shape[1:] not in (losses.shape[1:], losses.shape[2:]):
        raise ShapeError(
            f"costs: expected (lengths, heads, rules) or (lengths, rules) for losses {tuple(losses.shape)}, "
            f"got {tuple(costs.shape)}"
        )
    if not losses.isfinite().all() or not costs.isfinite().all():
        raise ArgumentError("losses and costs must be finite")
    limit = torch.as_tensor(bounds, dtype=torch.float64)
    if limit.shape != costs.shape[:1]:
        raise ShapeError(f"bounds: expected one per length of costs, {len(costs)}, got {tuple(limit.shape)}")
    return losses.double().numpy(force=True), _per_head(costs, losses).double().numpy(force=True), limit.numpy()


def _per_head(costs: Tensor, losses: Tensor) -> Tensor:
    return costs if costs.ndim == 3 else costs[:, None].expand(-1, losses.shape[1], -1)


def _solution(rules: Sequence[int], losses: Tensor, costs: Tensor) -> Solution:
    chosen = torch.tensor(rules)
    heads = torch.arange(len(chosen))
    return Solution(chosen, losses[:, heads, chosen].sum(-1), _per_head(costs, losses)[:, heads, chosen].sum(-1))
