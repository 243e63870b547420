"""A site: one attention module of a pretrained model."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from regard.errors import Unsupported
from regard.positions import rotate, unrotate


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary embedding a site's model uses, at any positions.

    Attributes:
        module: the model's own rotary module (frequencies, scaling).
        layer_type: passed on where the model keeps one set of frequencies per kind of layer (Gemma 3).
    """

    module: nn.Module
    layer_type: str | None = None

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (..., N, rotary_dim) in the dtype of `like` for integer `positions` (..., N)."""
        flat = positions.reshape(-1, positions.shape[-1])
        args = (like, flat) if self.layer_type is None else (like, flat, self.layer_type)
        cos, sin = self.module(*args)
        return cos.view(*positions.shape, -1), sin.view(*positions.shape, -1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate raw `x` (B, H, N, D) to `positions` (N,), (B, N) or (B, H, N)."""
        return rotate(x, *self._broadcast(x, positions))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Take the rotation at `positions` back."""
        return unrotate(x, *self._broadcast(x, positions))

    def _broadcast(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if positions.ndim == 2:
            positions = positions[:, None]
        return self.angles(positions, x)


#: causal self-attention, noncausal self-attention (of texts, pictures, sounds), attention to another sequence
Kind = Literal["decoder", "encoder", "cross"]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module.

    Attributes:
        index: of the site in the model; the layer where there is one site a layer.
        layer: its place in the cache.
        name: dotted name in the model.
        module: the attention module itself.
        kind: "decoder", "encoder" or "cross".
        window: sliding-window size of this layer, or None where it sees the full context.
        rotary: the model's rotary embedding, or None where there is none (or none that regard can invert).
        stack: the module whose forward is told about positions and padding of the site's queries, or None.
    """

    index: int
    layer: int
    name: str
    module: nn.Module
    kind: Kind = "decoder"
    window: int | None = None
    rotary: Rotary | None = None
    stack: nn.Module | None = None

    def need_rotary(self, who: str) -> Rotary:
        """The rotary embedding, or `Unsupported` naming the method that cannot work without."""
        if self.rotary is None:
            raise Unsupported(
                f"{who} re-assigns rotary positions, but {self.name} ({type(self.module).__name__}) has no static "
                "rotate-half rotary embedding that regard recognises"
            )
        return self.rotary


def is_rotate_half(apply_rotary: object) -> bool:
    """Whether a model's `apply_rotary_pos_emb(q, k, cos, sin)` computes what `regard.positions.rotate` does."""
    if not callable(apply_rotary):
        return False
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(1, 1, 3, 8, generator=generator) for _ in range(3))
    try:
        turned, _ = apply_rotary(x, x, cos[:, 0], sin[:, 0])
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return turned.shape == x.shape and torch.allclose(turned, rotate(x, cos, sin), atol=1e-5)
