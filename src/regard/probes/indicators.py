"""What a map of attention weights looks like, in numbers."""

import torch
from torch import Tensor

from regard.errors import ShapeError


def attention_indicators(weights: Tensor, distances: int = 4) -> dict[str, Tensor]:
    """Indicators of attention maps (arXiv:2510.11602).

    Args:
        weights: (B, H, N, N), rows sum to one.
        distances: for how many distances the local focus is given.

    Returns:
        ``entropy`` (B, H): of the rows, in nats, summed over them. ``concentration`` (B, H): the Frobenius norm.
        ``head_diversity`` (B,): standard deviation over heads, the mean over the entries of the lower triangle; zero
        for one head. ``sink`` (B, H): mean weight of the first token. ``local_focus`` (B, H, distances): mean weight
        of the token at distance 0, 1, …, over the queries that have one.

    Raises:
        ShapeError: not square maps of heads.
    """
    if weights.dim() != 4 or weights.shape[-1] != weights.shape[-2]:
        raise ShapeError(f"weights: expected (B, H, N, N), got {tuple(weights.shape)}")
    heads, n = weights.shape[1], weights.shape[-1]
    spread = weights.std(1) if heads > 1 else torch.zeros_like(weights[:, 0])
    focus = [
        weights.diagonal(-d, -2, -1).mean(-1) if d < n else weights.new_zeros(weights.shape[:2])
        for d in range(distances)
    ]
    return {
        "entropy": torch.special.entr(weights).sum((-2, -1)),
        "concentration": weights.square().sum((-2, -1)).sqrt(),
        "head_diversity": spread.tril().sum((-2, -1)) * 2 / (n * (n + 1)),
        "sink": weights[..., 0].mean(-1),
        "local_focus": torch.stack(focus, -1),
    }
