"""The integer program of a plan, for HiGHS: one rule per head, cost bounds, and few different rules per layer."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from regard.errors import require

_SLACK = 1e-9  # relative, so that a bound met exactly is met


@dataclass(frozen=True, eq=False)
class Program:
    """Variables are x (heads · rules), and y (layers · rules): which rules a layer uses.

    Attributes:
        losses: (P, heads, rules). costs: (Q, heads, rules).
        least, most: (Q,) bounds of the costs of all heads together.
        heads_per_layer: heads, in a row, that form a layer.
        max_rules: different rules that a layer may use, or None.
        options: of `scipy.optimize.milp`.
    """

    losses: np.ndarray
    costs: np.ndarray
    least: np.ndarray
    most: np.ndarray
    heads_per_layer: int
    max_rules: int | None
    options: dict[str, float]

    def __post_init__(self) -> None:
        require("scipy", "choose the rules of a plan")

    def solve(self, objective: int, least: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """The rules (heads,) of least loss at one length, with all losses within bounds (P,), or None."""
        from scipy.optimize import Bounds, milp

        weights = self.losses.reshape(len(self.losses), -1)
        slack = _SLACK * np.abs(weights).sum(1)
        target = np.zeros(self._width)
        target[: weights.shape[1]] = weights[objective] / (np.abs(weights[objective]).max() or 1.0)
        found = milp(
            target,
            integrality=np.ones(self._width),
            bounds=Bounds(0, 1),
            constraints=[*self._constraints, self._rows(weights, least - slack, most + slack)],
            options=self.options,
        )
        if found.x is None:
            return None
        return found.x[: weights.shape[1]].reshape(self.losses.shape[1:]).argmax(1)

    def total(self, choice: np.ndarray) -> np.ndarray:
        """(P,) loss of a choice at each length."""
        return self.losses[:, np.arange(len(choice)), choice].sum(-1)

    @cached_property
    def _width(self) -> int:
        _, heads, rules = self.losses.shape
        return heads * rules + (0 if self.max_rules is None else heads // self.heads_per_layer * rules)

    def _rows(self, of_x: Any, least: Any, most: Any) -> Any:
        """Bounds on linear functions of x (rows, heads · rules)."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_matrix, hstack

        of_x = csr_matrix(of_x)
        rest = csr_matrix((of_x.shape[0], self._width - of_x.shape[1]))
        return LinearConstraint(hstack([of_x, rest], format="csc"), least, most)

    @cached_property
    def _constraints(self) -> list[Any]:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_matrix, eye, hstack, kron

        _, heads, rules = self.losses.shape
        size, spare = heads * rules, _SLACK * np.abs(self.most)
        found = [
            self._rows(kron(eye(heads), np.ones((1, rules))), 1, 1),
            self._rows(self.costs.reshape(-1, size), self.least - spare, self.most + spare),
        ]
        if self.max_rules is not None:
            layers = heads // self.heads_per_layer
            # x_hc <= y_lc: a rule that a head has is one that its layer uses
            of_layer = kron(kron(eye(layers), np.ones((self.heads_per_layer, 1))), eye(rules))
            found.append(LinearConstraint(hstack([eye(size), -of_layer], format="csc"), -np.inf, 0))
            used = hstack([csr_matrix((layers, size)), kron(eye(layers), np.ones((1, rules)))], format="csc")
            found.append(LinearConstraint(used, -np.inf, self.max_rules))
        return found
