"""Query heads that share a key head, as one more dimension: the layout both fast backends compute in."""

from torch import Tensor
from torch.nn import functional as F

from regard.attention.problem import Problem


def fold(p: Problem, same_dim: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q (B·Hk, G, N, D), k (B·Hk, G, M, D), v (B·Hk, G, M, Dv); k and v are views with stride 0 along G.

    ``same_dim`` pads the narrower of D and Dv with zeros, which changes neither scores nor outputs (`unfold` cuts).
    """
    q = p.query.reshape(p.batch * p.kv_heads, p.groups, p.n, p.query.shape[3])
    k = p.key.reshape(p.batch * p.kv_heads, 1, p.m, p.key.shape[3])
    v = p.value.reshape(p.batch * p.kv_heads, 1, p.m, p.value.shape[3])
    if same_dim and (extra := v.shape[-1] - k.shape[-1]):
        q, k, v = F.pad(q, (0, max(extra, 0))), F.pad(k, (0, max(extra, 0))), F.pad(v, (0, max(-extra, 0)))
    # the kernels step along the last dimension with stride one
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return q, k.expand(-1, p.groups, -1, -1), v.expand(-1, p.groups, -1, -1)


def fold_mask(p: Problem, tile: Tensor) -> Tensor:
    """A tile broadcastable to (B, H, n, m), made broadcastable to (B·Hk, G, n, m), as a view where that is possible."""
    b, h, n, m = tile.shape
    if b == 1 and h == 1:
        return tile
    return tile.expand(p.batch, p.heads, n, m).reshape(p.batch * p.kv_heads, p.groups, n, m)


def unfold(p: Problem, out: Tensor) -> Tensor:
    """(B·Hk, G, N, ...) back to (B, H, N, ...)."""
    return out.reshape(p.batch, p.heads, *out.shape[2:])
