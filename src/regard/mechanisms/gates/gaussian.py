"""Gaussian adaptive attention (GAAM): features reweighted by learned Gaussians around their own mean."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly

EPS = 1e-8


class GaussianAdaptiveAttention(nn.Module):
    """One layer of GAAM (arXiv:2401.11143) along one axis of a tensor of any rank.

    The axis is cut into m chunks of floor(n / m) entries, the last one taking the rest. Each chunk z has a head:

        G = Π_k exp(-((z - mean(z) - δ_k)² / var(z)) / (2 c_k²)) / √(2π c_k²)        k = 1 … K
        w = G / Σ G,  y = z w                                                       along the axis

    The Gaussians are multiplied, so together they are one of precision Σ 1 / c_k². What an entry weighs depends on its
    own distance from the mean: no pairs, any order. Weights sum to one over a chunk, so y is about m / n times x in
    size; `GaussianBlock` adds a residual. Any shape to the same shape; cost O(K n), 2 m K parameters.

    It is no `Mechanism`: the axis may be any, and every entry sees the mean of all, so nothing here is causal.

    Args:
        axis: which one, may be negative.
        num_heads: m.
        num_gaussians: K.
        padding_value: entries of exactly this value are padding, as in the published code; ``valid`` is the safer way.
    """

    def __init__(self, axis: int, num_heads: int = 1, num_gaussians: int = 1, padding_value: float | None = None):
        super().__init__()
        for name, number in (("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if number < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {number}")
        self.axis, self.num_heads, self.padding_value = axis, num_heads, padding_value
        self.mean_offsets = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        self.c = nn.Parameter(torch.randn(num_heads, num_gaussians).exp())

    @overload
    def forward(self, x: Tensor, valid: Tensor | None = None, *, return_weights: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Reweight x.

        Args:
            x: any shape with at least 2 axes and 2 m entries along the axis.
            valid: bool, broadcastable to x; False marks padding, which counts as zeros and is returned as it was.
            return_weights: also return w, shaped as x.
        """
        if x.dim() < 2 or not -x.dim() <= self.axis < x.dim():
            raise ShapeError(f"x: expected at least 2 axes and one numbered {self.axis}, got {tuple(x.shape)}")
        if (n := x.shape[self.axis]) < 2 * self.num_heads:
            raise ShapeError(f"x: {self.num_heads} heads need {2 * self.num_heads} entries along the axis, got {n}")
        padding, z = None, x
        if valid is not None:
            padding = ~_broadcast(valid, x)
            z = x.masked_fill(padding, 0.0)
        elif self.padding_value is not None:
            padding = x == self.padding_value
        size = n // self.num_heads
        sizes = [size] * (self.num_heads - 1) + [n - size * (self.num_heads - 1)]
        outs, all_weights = [], []
        for head, chunk in enumerate(z.split(sizes, self.axis)):
            hidden = None if padding is None else padding.narrow(self.axis, head * size, sizes[head])
            all_weights.append(self._weights(chunk, hidden, head))
            outs.append(chunk * all_weights[-1])
        y, weights = torch.cat(outs, self.axis), torch.cat(all_weights, self.axis)
        if padding is not None:
            y = torch.where(padding, x, y)
        return (y, weights) if return_weights else y

    def _weights(self, z: Tensor, padding: Tensor | None, head: int) -> Tensor:
        known = z if padding is None else z.masked_fill(padding, 0.0)
        mean = known.mean(self.axis, keepdim=True)
        variance = known.var(self.axis, keepdim=True) + EPS
        density = torch.ones_like(z)
        # in the published order of operations: in float32 any other moves gradients by more than 1e-6
        for delta, c in zip(self.mean_offsets[head], self.c[head], strict=True):
            spread = c.square().clamp(min=EPS)  # c is free to reach 0
            distance = (z - (mean + delta)) / variance.sqrt()
            gaussian = (-distance.square() / (2 * spread)).exp() / (2 * math.pi * spread).sqrt()
            density = density * gaussian
        return density / density.sum(self.axis, keepdim=True).clamp(min=EPS)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None = None,
        eps: float = EPS,
    ) -> Self:
        """Weights of the published MultiHeadGaussianAdaptiveAttention, which never gets to use its ``eps``."""
        module = cls(norm_axis, num_heads, num_gaussians, padding_value)
        state = dict(state_dict)
        for name in ("mean_offsets", "c"):
            heads = [state.pop(f"attention_heads.{head}.{name}", None) for head in range(num_heads)]
            if (known := [head for head in heads if head is not None]) and len(known) == num_heads:
                state[name] = torch.stack(known)
        load_strictly(module, state)
        return module


class GaussianBlock(nn.Module):
    """Layers of Gaussian adaptive attention with residuals (GAT, arXiv:2401.11143).

        x ← x + GAAM_i(x)        each along its own axis, with its own heads and Gaussians

    Any shape to the same shape. Cost O(K n) per layer.

    Args:
        axes: the axis of every layer.
        num_heads: of every layer, or one number for all.
        num_gaussians: of every layer, or one number for all.
        padding_value: see `GaussianAdaptiveAttention`.
    """

    def __init__(
        self,
        axes: Sequence[int],
        num_heads: int | Sequence[int] = 1,
        num_gaussians: int | Sequence[int] = 1,
        padding_value: float | None = None,
    ):
        super().__init__()
        heads = [num_heads] * len(axes) if isinstance(num_heads, int) else num_heads
        gaussians = [num_gaussians] * len(axes) if isinstance(num_gaussians, int) else num_gaussians
        for name, values in (("num_heads", heads), ("num_gaussians", gaussians)):
            if len(values) != len(axes):
                raise ArgumentError(f"{name}: expected one for each of {len(axes)} axes, got {len(values)}")
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(axis, m, k, padding_value)
            for axis, m, k in zip(axes, heads, gaussians, strict=True)
        )

    @overload
    def forward(self, x: Tensor, valid: Tensor | None = None, *, return_weights: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_weights: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Reweight x layer by layer; ``return_weights`` also returns the weights of each, shaped as x."""
        weights = []
        for layer in self.layers:
            y, w = layer(x, valid, return_weights=True)
            x = y + x
            weights.append(w)
        return (x, weights) if return_weights else x

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        variant: str = "GaussianBlock",
        num_layers: int | None = None,
        eps: float = EPS,
        **official_kwargs: Any,
    ) -> nn.Module:
        """Weights of gioannides/Gaussian-Adaptive-Attention on GitHub.

        Args:
            variant: "GaussianBlock", or "MultiHeadGaussianAdaptiveAttention" for one of its layers, which is a
                `GaussianAdaptiveAttention`.
        """
        if variant == "MultiHeadGaussianAdaptiveAttention":
            return GaussianAdaptiveAttention.from_official(state_dict, **official_kwargs)
        if variant != "GaussianBlock":
            raise ArgumentError(
                f"variant: expected GaussianBlock or MultiHeadGaussianAdaptiveAttention, got {variant!r}"
            )
        axes = official_kwargs.pop("norm_axes")
        if num_layers not in (None, len(axes)):
            raise ArgumentError(f"num_layers: {num_layers} does not fit {len(axes)} norm_axes")
        block = cls(axes, **official_kwargs)
        loaded: set[str] = set()
        for i, layer in enumerate(block.layers):
            assert isinstance(layer, GaussianAdaptiveAttention)
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
            same = GaussianAdaptiveAttention.from_official(
                own, norm_axis=layer.axis, num_heads=layer.num_heads, num_gaussians=layer.c.shape[1]
            )
            layer.load_state_dict(same.state_dict())
            loaded |= {prefix + name for name in own}
        if left := sorted(state_dict.keys() - loaded):
            raise ArgumentError(f"state_dict does not fit {cls.__name__}: unexpected {', '.join(left)}")
        return block


def importance_factor(weights: Tensor, dim: int) -> Tensor:
    """How much every position of an axis weighs on average over data, from 0 (least) to 1 (most).

    The paper's formula is reconstructed: its experiments were not published.

    Args:
        weights: w of one layer for any number of inputs, (..., n, ...).
        dim: the axis that is ranked.

    Returns:
        (n,); zeros where all weigh the same.
    """
    mean = weights.movedim(dim, 0).flatten(1).mean(1)
    low, high = mean.aminmax()
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


def _broadcast(valid: Tensor, x: Tensor) -> Tensor:
    fits = valid.dim() <= x.dim() and all(
        a in (1, b) for a, b in zip(reversed(valid.shape), reversed(x.shape), strict=False)
    )
    if valid.dtype != torch.bool or not fits:
        raise ShapeError(
            f"valid: expected bool broadcastable to {tuple(x.shape)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    return valid.expand(x.shape)
