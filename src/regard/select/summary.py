"""Summaries of runs of tokens, and scores between them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError

#: how the tokens of a block become one vector; "norm" is sum / sqrt(length), which favours long blocks less than a sum
#: and more than a mean (DHSA, arXiv:2510.24606)
POOLINGS = ("mean", "max", "norm")
#: whose scores are averaged so that they choose together
SHARING = ("head", "group", "all")


def pool(x: Tensor, block_size: int, pooling: str = "mean") -> Tensor:
    """Summarise consecutive blocks of tokens: (..., N, D) -> (..., ceil(N / block_size), D), float32 or wider.

    The last block may be partial; it is summarised over the tokens it has.
    """
    check_choice("pooling", pooling, POOLINGS)
    n = x.shape[-2]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if pooling == "max":
        return F.pad(x, (0, 0, 0, -n % block_size), value=-torch.inf).unflatten(-2, (-1, block_size)).amax(-2)
    total = F.pad(x, (0, 0, 0, -n % block_size)).unflatten(-2, (-1, block_size)).sum(-2)
    start = torch.arange(0, n, block_size, device=x.device)
    return _divide(total, (n - start).clamp(max=block_size).unsqueeze(-1), pooling)


def pool_segments(x: Tensor, boundaries: Tensor, pooling: str = "mean") -> Tensor:
    """Summarise segments of any lengths: (B, N, D) -> (B, S, D), float32 or wider.

    Args:
        boundaries: (B, S + 1) ascending integers from 0 to N; segment s holds tokens ``boundaries[s]`` up to
            ``boundaries[s + 1]``. Empty segments give zeros.
    """
    check_choice("pooling", pooling, POOLINGS)
    batch, n, dim = x.shape
    if boundaries.dim() != 2 or boundaries.shape[0] != batch:
        raise ShapeError(f"boundaries: expected shape ({batch}, S + 1), got {tuple(boundaries.shape)}")
    length = boundaries.diff(dim=-1)
    if bool((length < 0).any()) or bool((boundaries[:, 0] != 0).any()) or bool((boundaries[:, -1] != n).any()):
        raise ArgumentError(f"boundaries: expected ascending positions from 0 to {n}, got {boundaries.tolist()}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    index = segment_of(boundaries, n).unsqueeze(-1).expand(-1, -1, dim)
    summary = x.new_zeros(batch, length.shape[1], dim)
    if pooling == "max":
        return summary.scatter_reduce(1, index, x, "amax", include_self=False)
    return _divide(summary.scatter_add(1, index, x), length.clamp(min=1).unsqueeze(-1), pooling)


def segment_of(boundaries: Tensor, n: int) -> Tensor:
    """(B, n): the segment each token lies in, for boundaries as in `pool_segments`."""
    tokens = torch.arange(n, device=boundaries.device).expand(boundaries.shape[0], -1)
    return torch.searchsorted(boundaries, tokens.contiguous(), right=True) - 1


def block_scores(query: Tensor, key: Tensor, shared: str = "head", scale: float = 1.0) -> Tensor:
    """Scores between summaries: query (B, H, nq, D) and key (B, Hk, nk, D) -> (B, H or Hk or 1, nq, nk).

    Args:
        shared: "head" scores every query head on its own; "group" averages over the query heads that share a key head,
            "all" over all of them, so that the heads choose together.
    """
    check_choice("shared", shared, SHARING)
    kv_heads = key.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1))  # (B, Hk, G, nq, D)
    if shared == "head":
        return (grouped @ key.unsqueeze(2).mT).flatten(1, 2) * scale
    scores = grouped.mean(2) @ key.mT * scale
    return scores if shared == "group" else scores.mean(1, keepdim=True)


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")


def _divide(total: Tensor, length: Tensor, pooling: str) -> Tensor:
    length = length.to(total.dtype)
    return total / (length if pooling == "mean" else length.sqrt())
