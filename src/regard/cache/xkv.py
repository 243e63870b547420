"""xKV (arXiv:2503.18893): the keys, and the values, of consecutive layers share one low-rank basis over the tokens.

    X = [X_1 … X_G]  (B, N, G·d),   d = Hk·D, keys before rotation
    X ≈ A [B_1 … B_G],   A (B, N, r) held once,   B_l (B, r, d) held per layer

also MiniCache (arXiv:2405.14366) as the published code of xKV has it, the baseline that merges pairs of layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


def group_layers(layers: Sequence[int], group_size: int) -> list[list[int]]:
    """Consecutive layers in groups of `group_size`; the last group may be shorter."""
    if group_size < 1:
        raise ArgumentError(f"group_size must be at least 1, got {group_size}")
    return [list(layers[i : i + group_size]) for i in range(0, len(layers), group_size)]


def cross_layer_svd(xs: Sequence[Tensor], rank: int, randomized: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The best approximation of rank `rank` of several layers' (B, N, d_l), side by side, as a product.

    Exact by default: X is projected onto its leading singular vectors on its smaller side, which are eigenvectors of
    XᵀX or XXᵀ, taken in float64 so that squaring costs no digit of float32. `randomized` samples the subspace instead
    (`torch.svd_lowrank`): faster, slightly worse, and it draws from torch's global random generator.

    Returns:
        basis A (B, N, r) and per layer B_l (B, r, d_l), r = min(rank, N, Σ d_l), in the dtype of the input.

    Raises:
        ShapeError: no layers, or layers that differ in batch or tokens.
        ArgumentError: rank below 1.
    """
    if not xs or any(x.ndim != 3 or x.shape[:2] != xs[0].shape[:2] for x in xs):
        raise ShapeError(f"expected layers of shape (B, N, d) with equal B and N, got {[tuple(x.shape) for x in xs]}")
    if rank < 1:
        raise ArgumentError(f"rank must be at least 1, got {rank}")
    x = torch.cat(tuple(xs), dim=-1)
    tokens, width = x.shape[1:]
    rank = min(rank, tokens, width)
    if randomized:
        u, s, v = torch.svd_lowrank(x.float(), q=min(rank + 8, tokens, width))
        basis, factor = u[..., :rank] * s[..., None, :rank], v[..., :rank].mT
    elif width <= tokens:
        factor = _leading(x.mT, rank).mT
        basis = x.double() @ factor.mT
    else:
        basis = _leading(x, rank)
        factor = basis.mT @ x.double()
    parts = factor.to(x.dtype).split([part.shape[-1] for part in xs], dim=-1)
    return basis.to(x.dtype).contiguous(), [part.contiguous() for part in parts]


def _leading(x: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of x (B, n, m), n <= m: (B, n, rank), float64."""
    x = x.double()
    return torch.linalg.eigh(x @ x.mT).eigenvectors[..., -rank:].flip(-1)


def minicache_merge(x1: Tensor, x2: Tensor, t: float = 0.5, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Give the rows (..., D) of two layers that point far apart one common direction, keeping their lengths.

        Ω = angle(x1, x2),   e = sin((1-t)Ω)/sinΩ · x1/|x1| + sin(tΩ)/sinΩ · x2/|x2|
        x_l -> |x_l| e   where Ω > Ω_min + gamma (Ω_max - Ω_min), over all rows;   unchanged elsewhere

    As in the published code it is the *divergent* rows that are merged (the paper of MiniCache keeps exactly those),
    so gamma = 1 merges nothing. Rows that are parallel up to rounding are interpolated linearly.
    """
    tiny = torch.finfo(x1.dtype).tiny
    n1, n2 = (x.norm(dim=-1, keepdim=True).clamp_min(tiny) for x in (x1, x2))
    u1, u2 = x1 / n1, x2 / n2
    angle = (u1 * u2).sum(-1, keepdim=True).clamp(-1.0, 1.0).acos()
    lowest, highest = angle.min(), angle.max()
    merged = angle > lowest + gamma * (highest - lowest)
    e = (torch.sin((1 - t) * angle) * u1 + torch.sin(t * angle) * u2) / angle.sin()
    e = torch.where(angle < 1e-7, (1 - t) * x1 + t * x2, e)
    return torch.where(merged, n1 * e, x1), torch.where(merged, n2 * e, x2)


def subspace_overlap(x1: Tensor, x2: Tensor, rank: int) -> Tensor:
    """How far the leading token subspaces of two layers agree: the premise of xKV.

        ‖U_1ᵀ U_2‖² / r = mean cos² of the principal angles,   U_l the first r left singular vectors

    Args:
        x1, x2: (B, N, d) keys before rotation, or values.
        rank: r, at most N and d.

    Returns:
        (B,), from r / N for unrelated subspaces to 1 for the same.
    """
    u1, u2 = (torch.linalg.svd(x.double(), full_matrices=False).U[..., :rank] for x in (x1, x2))
    return (u1.mT @ u2).square().sum((-2, -1)) / rank
