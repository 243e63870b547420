"""One configuration of a mechanism for the contract tests."""

import pkgutil
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from regard.mechanisms import Mechanism, create
from tests.mechanisms import cases


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        name: of this configuration.
        config: arguments of the mechanism; weights are drawn from N(0, 0.3²), so that nothing is zero.
        lengths: sequence lengths to test, odd ones and one among them. Only what the mechanism cannot do at all is left
            out (a fixed grid); say why beside it.
        atol: of streaming against parallel, in float32.
        pads: whether padding is supported (`valid`).
        compiles: whether the parallel form compiles without graph breaks.
        part: of the system, where it is not its main class.
        bf16_atol: of bfloat16 against float32, times the largest output; None where a discrete choice (top-k) flips.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 2, 7, 16, 33)
    atol: float = 1e-5
    pads: bool = True
    compiles: bool = False
    part: str | None = None
    bf16_atol: float | None = 0.05

    def make(self, slug: str) -> Mechanism:
        mechanism = create(slug, **self.config)
        assert isinstance(mechanism, Mechanism)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in mechanism.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return mechanism.eval()


def all_cases() -> list[tuple[str, Case]]:
    """(name, case) of everything under `tests/mechanisms/cases`; the name is a slug, or "slug/part"."""
    found = []
    for module in pkgutil.iter_modules(cases.__path__):
        slug = module.name.replace("_", "-")
        for case in import_module(f"{cases.__name__}.{module.name}").CASES:
            found.append((slug if case.part is None else f"{slug}/{case.part}", case))
    return found
