"""Functions of a query and a set of keys: what a single attention layer can or cannot learn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError


class Samples(NamedTuple):
    """x0 (B, d) queries, keys (B, N, d), y (B,)."""

    x0: Tensor
    keys: Tensor
    y: Tensor


@dataclass(frozen=True)
class PermutationInvariantTask:
    """A target that averages over keys (arXiv:2307.11353), all inputs uniform on the unit sphere.

        f1  mean_i <β, x_i>^p                    of the keys
        f2  mean_i <x_0, x_i>^p <β, x_i>         of keys and query together
        f3  mean_i F(<x_0, x_i>) G(<β, x_i>)     the same with any two functions

    Args:
        name: "f1", "f2" or "f3".
        dim: d.
        num_keys: N.
        power: p of f1 and f2.
        beta: unit vector (d,); the first axis by default, which on a sphere is as good as any.
        query_link, key_link: F and G of f3.
    """

    name: str = "f1"
    dim: int = 12
    num_keys: int = 12
    power: int = 2
    beta: Tensor | None = None
    query_link: Callable[[Tensor], Tensor] = torch.cos
    key_link: Callable[[Tensor], Tensor] = torch.cos

    def __post_init__(self) -> None:
        if self.name not in ("f1", "f2", "f3"):
            raise ArgumentError(f"name: expected 'f1', 'f2' or 'f3', got {self.name!r}")
        for name, value in (("dim", self.dim), ("num_keys", self.num_keys), ("power", self.power)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if self.beta is not None and (self.beta.shape != (self.dim,) or abs(float(self.beta.norm()) - 1) > 1e-4):
            found = f"{tuple(self.beta.shape)} of norm {float(self.beta.norm()):.4g}"
            raise ArgumentError(f"beta: expected a unit vector ({self.dim},), got {found}")

    def __call__(self, x0: Tensor, keys: Tensor) -> Tensor:
        """(B,) of queries (B, d) and keys (B, N, d)."""
        beta = x0.new_tensor([1.0] + [0.0] * (self.dim - 1)) if self.beta is None else self.beta.to(x0)
        along, shared = keys @ beta, (keys @ x0[:, :, None])[..., 0]
        if self.name == "f1":
            return (along**self.power).mean(1)
        if self.name == "f2":
            return (shared**self.power * along).mean(1)
        return (self.query_link(shared) * self.key_link(along)).mean(1)

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Samples:
        """Fresh samples, in float64."""
        x = torch.randn(batch, self.num_keys + 1, self.dim, dtype=torch.float64, generator=generator)
        x = x / x.norm(dim=-1, keepdim=True)
        x0, keys = x[:, 0], x[:, 1:]
        return Samples(x0, keys, self(x0, keys))
