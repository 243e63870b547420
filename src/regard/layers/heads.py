"""Channels as heads and back."""

from einops import rearrange
from torch import Tensor

from regard.errors import ArgumentError


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H·D), head-major channels, to (B, H, N, D)."""
    return rearrange(x, "b n (h d) -> b h n d", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H·D)."""
    return rearrange(x, "b h n d -> b n (h d)")


def per_head(dim: int, num_heads: int, head_dim: int | None = None, num_kv_heads: int | None = None) -> tuple[int, int]:
    """Check a head layout; returns (head_dim, num_kv_heads) with their defaults ``dim / num_heads`` and ``num_heads``.

    Raises:
        ArgumentError: the numbers do not divide each other.
    """
    if num_heads < 1:
        raise ArgumentError(f"num_heads: expected at least 1, got {num_heads}")
    if head_dim is None:
        if dim % num_heads:
            raise ArgumentError(f"num_heads: {num_heads} heads do not divide dim {dim}; give head_dim to set it freely")
        head_dim = dim // num_heads
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ArgumentError(f"num_kv_heads: {num_kv_heads} key heads do not divide {num_heads} query heads")
    return head_dim, num_kv_heads
