"""Low-rank changes to a linear layer."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError


class LoRA(nn.Module):
    """``x A B``, to be added to a linear layer's output (arXiv:2106.09685); zero at the start, because B is.

    (..., dim_in) to (..., dim_out).
    """

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float | None = None):
        super().__init__()
        if rank < 1:
            raise ArgumentError(f"rank: expected at least 1, got {rank}")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.down = nn.Parameter(torch.randn(dim_in, rank) * dim_in**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ self.up * self.scale


class LoRALinear(nn.Module):
    """A linear layer, frozen, and what is learned on top of it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float | None = None):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora = LoRA(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer, changed in place to do it all."""
        self.linear.weight += (self.lora.down @ self.lora.up * self.lora.scale).mT
        return self.linear.requires_grad_()


def inject_lora(model: nn.Module, names: Collection[str], rank: int, alpha: float | None = None) -> None:
    """Put a `LoRALinear` in the place of every linear layer with one of these names."""
    found = [
        (parent, name) for parent in model.modules() for name in names if type(getattr(parent, name, None)) is nn.Linear
    ]
    for parent, name in found:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha))


def merge_lora(model: nn.Module) -> None:
    """Put the merged linear layer in the place of every `LoRALinear`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
