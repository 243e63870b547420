"""torch's scaled_dot_product_attention; full and causal attention are recognised and need no mask."""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.attention import tile
from regard.attention.heads import fold, fold_mask, unfold
from regard.attention.partial import Partial, merge
from regard.attention.plan import holds_table
from regard.attention.problem import Problem
from regard.errors import Unsupported
from regard.masks.combine import Shift
from regard.masks.sequence import Band


def refuses(p: Problem, return_lse: bool) -> str | None:
    """Why this backend cannot solve the problem, or None."""
    if not return_lse:
        return None
    if p.device.type != "cpu":
        return "torch gives no differentiable log-sum-exp away from the CPU"
    if p.needs_grad and p.bias is not None and p.bias.requires_grad:
        return "torch's fused kernel gives no gradient for a bias"
    return None


def run(p: Problem, return_lse: bool = False) -> Partial:
    """Attention with torch's fused kernels; without ``return_lse`` the lse of the result is meaningless.

    Raises:
        Unsupported: see `refuses`; the `blocks` backend does all of it.
    """
    if reason := refuses(p, return_lse):
        raise Unsupported(f"backend 'sdpa' with return_lse: {reason}; use backend='blocks'")
    on_cpu = p.device.type == "cpu"
    fused = on_cpu and refuses(p, True) is None
    if on_cpu and not fused and p.query.dtype in (torch.float32, torch.float64):
        return Partial(_written_out(p), p.query.new_empty(0))
    q, k, v = fold(p, same_dim=on_cpu)
    offset = None if p.bias is not None else causal_offset(p)
    if fused:
        out, lse = _fused(p, q, k, v, offset)
    else:
        out, lse = _torch(p, q, k, v, offset), q.new_empty(0)
    return Partial(unfold(p, out[..., : p.value.shape[-1]]), unfold(p, lse) if return_lse else lse)


def causal_offset(p: Problem) -> int | None:
    """The c for which query i sees exactly the keys ``j <= i + c``, if there is one (c = M if it sees all)."""
    if p.mask is None:
        return p.m
    if isinstance(p.mask, Tensor) or holds_table(p.mask):
        return None
    shift, mask = (p.mask.offset, p.mask.mask) if isinstance(p.mask, Shift) else (0, p.mask)
    if isinstance(mask, Band) and mask.least is not None and (mask.most is None or mask.most >= p.n - 1 + shift):
        offset = shift - mask.least
        return offset if offset >= 0 else None
    corners = (torch.tensor([x]) for x in (0, p.n, 0, p.m))
    return p.m if bool(p.mask.to("cpu").rect(*corners)[1].all()) else None


def _fused(p: Problem, q: Tensor, k: Tensor, v: Tensor, offset: int | None) -> Partial:
    """On CPU the kernel under torch's function is called directly: it also returns the lse."""
    if offset is None:
        return Partial(*tile.Attend.apply(q, k, v, _additive(p, q.dtype), p.scale, False))
    if offset >= p.m - 1:
        return Partial(*tile.Attend.apply(q, k, v, None, p.scale, False))
    recent = tile.Attend.apply(q, k[..., offset:, :], v[..., offset:, :], None, p.scale, True)
    if offset == 0:
        return Partial(*recent)
    earlier = tile.Attend.apply(q, k[..., :offset, :], v[..., :offset, :], None, p.scale, False)
    return merge(Partial(*earlier), Partial(*recent))


def _torch(p: Problem, q: Tensor, k: Tensor, v: Tensor, offset: int | None) -> Tensor:
    if offset is not None and offset >= p.m - 1:
        return F.scaled_dot_product_attention(q, k, v, scale=p.scale)
    if offset == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=p.scale)
    additive = _additive(p, q.dtype).to(q.dtype)
    # not every kernel under torch's function survives rows that see nothing
    unseen = (additive == -torch.inf).all(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, additive.masked_fill(unseen, 0.0), scale=p.scale)
    return out.masked_fill(unseen, 0.0)


def _written_out(p: Problem) -> Tensor:
    """What torch's function would do for a learnt bias on a CPU, with the bias as small as it was given."""
    term = _terms(p, p.query.dtype)
    unseen = (term == -torch.inf).all(-1, keepdim=True)
    q, k, v = p.query.unflatten(1, (p.kv_heads, p.groups)), p.key.unsqueeze(2), p.value.unsqueeze(2)
    scores = (q * p.scale @ k.mT).flatten(1, 2) + term.masked_fill(unseen, 0.0)
    weights = scores.softmax(-1).unflatten(1, (p.kv_heads, p.groups))
    return (weights @ v).flatten(1, 2).masked_fill(unseen, 0.0)


def _additive(p: Problem, dtype: torch.dtype) -> Tensor:
    """Mask and bias as one additive tensor, broadcastable to (B·Hk, G, N, M)."""
    return fold_mask(p, _terms(p, dtype))


def _terms(p: Problem, dtype: torch.dtype) -> Tensor:
    """Mask and bias as one additive tensor, broadcastable to (B, H, N, M)."""
    wide = torch.promote_types(dtype, torch.float32)
    allowed = p.allowed()
    if p.bias is None:
        assert allowed is not None
        return torch.zeros(allowed.shape, dtype=wide, device=p.device).masked_fill_(~allowed, -torch.inf)
    return p.bias.to(wide) if allowed is None else p.bias.to(wide).masked_fill(~allowed, -torch.inf)
