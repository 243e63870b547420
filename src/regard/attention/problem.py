"""The one checked description of an attention computation that every backend takes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.masks import Mask


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention computation; `checked` is the way to make one.

    Attributes:
        query: (B, H, N, D).
        key: (B, Hk, M, D), where Hk divides H; query head h reads key head ``h // (H / Hk)``.
        value: (B, Hk, M, Dv).
        mask: which pairs are allowed; a bool tensor is broadcastable to (B, H, N, M) and has rank 4.
        bias: added to the scaled scores; rank 4, broadcastable to (B, H, N, M).
        scale: multiplies ``query @ key.T``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | Tensor | None
    bias: Tensor | None
    scale: float

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def n(self) -> int:
        return self.query.shape[2]

    @property
    def m(self) -> int:
        return self.key.shape[2]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def needs_grad(self) -> bool:
        tensors = (self.query, self.key, self.value, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def allowed(self, q: slice = slice(None)) -> Tensor | None:
        """Which keys the given queries see: bool, broadcastable to (B, H, |q|, M)."""
        if self.mask is None:
            return None
        if isinstance(self.mask, Tensor):
            return self.mask if self.mask.shape[-2] == 1 else self.mask[..., q, :]
        index = torch.arange(max(self.n, self.m, self.batch, self.heads), device=self.device)
        allowed = self.mask(
            index[: self.batch, None, None, None],
            index[: self.heads, None, None],
            index[: self.n, None][q],
            index[: self.m],
        )
        return allowed[(None,) * (4 - allowed.ndim)]

    def bias_rows(self, q: slice = slice(None)) -> Tensor | None:
        """The bias of the given queries, broadcastable to (B, H, |q|, M)."""
        return self.bias if self.bias is None or self.bias.shape[-2] == 1 else self.bias[..., q, :]


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Problem:
    """Check the arguments of an attention call against each other and collect them.

    Raises:
        ShapeError: ranks, sizes, head counts or the shapes of mask and bias do not fit together.
        ArgumentError: dtypes or devices differ, or an argument is of a kind that is not understood.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ShapeError(
                f"{name}: expected four dimensions (batch, heads, tokens, head_dim), got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ArgumentError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ArgumentError(
                f"{name}: expected {query.dtype} on {query.device} like query, got {tensor.dtype} on {tensor.device}"
            )
    batch, heads, n, dim = query.shape
    kv_heads, m = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ShapeError(
            f"key: expected shape ({batch}, Hk, M, {dim}) to go with query {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            f"value: expected shape ({batch}, {kv_heads}, {m}, Dv) to go with key {tuple(key.shape)}, "
            f"got {tuple(value.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(f"key: {kv_heads} heads do not divide the {heads} heads of query")
    if dim == 0 and scale is None:
        raise ShapeError("query: head_dim is 0, so the default scale 1/sqrt(head_dim) does not exist")

    shape = (batch, heads, n, m)
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise ArgumentError(
                f"mask: expected a regard mask or a bool tensor (True = may be seen), got a tensor of {mask.dtype}; "
                "additive terms go in bias"
            )
        mask = _rank4("mask", mask, shape, query.device)
    elif isinstance(mask, Mask):
        if n and m:
            mask.check(n, m)
        for name, own, size in (("batch items", mask.batch, batch), ("heads", mask.heads, heads)):
            if own not in (None, size):
                raise ShapeError(f"mask: distinguishes {own} {name}, query has {size}: {mask!r}")
        mask = mask.to(query.device) if query.device.type != "cpu" else mask
    elif mask is not None:
        raise ArgumentError(f"mask: expected a regard mask, a bool tensor or None, got {type(mask).__name__}")
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise ArgumentError(f"bias: expected a floating point tensor, got {kind}")
        bias = _rank4("bias", bias, shape, query.device)
    return Problem(query, key, value, mask, bias, dim**-0.5 if scale is None else float(scale))


def _rank4(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A view of rank 4 of a tensor that broadcasts to shape."""
    fits = tensor.dim() <= 4 and all(a in (1, b) for a, b in zip(reversed(tensor.shape), reversed(shape), strict=False))
    if not fits:
        raise ShapeError(f"{name}: shape {tuple(tensor.shape)} does not broadcast to (B, H, N, M) = {shape}")
    if tensor.device != device:
        raise ArgumentError(f"{name}: expected a tensor on {device} like query, got one on {tensor.device}")
    return tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))


def bias_as_channels(p: Problem) -> Problem:
    """The same problem with a learnt bias per key as channels of the keys, where that is exact.

    A bias b (B, H, 1, M) is ``scale · q'·k'`` with k' = b / scale and q' = 1: one more channel for each query head of a
    key head. So the fused kernels, which give no gradient for a bias, can do it. On the CPU, in float32 or float64.
    """
    bias = p.bias
    if bias is None or not p.needs_grad or not bias.requires_grad or bias.shape[-2] != 1 or p.n < 2 or p.m == 0:
        return p
    exact = p.device.type == "cpu" and p.query.dtype in (torch.float32, torch.float64) and p.scale != 0
    if not exact or torch.compiler.is_compiling() or not bool(bias.isfinite().all()):
        return p
    each = (bias / p.scale).to(p.query.dtype).expand(p.batch, p.heads, 1, p.m)
    more = each.reshape(p.batch, p.kv_heads, p.groups, p.m).mT
    own = torch.eye(p.groups, dtype=p.query.dtype).repeat(p.kv_heads, 1)[:, None]  # (H, 1, G)
    query = torch.cat([p.query, own.expand(p.batch, p.heads, p.n, p.groups)], -1)
    return replace(p, query=query, key=torch.cat([p.key, more], -1), bias=None)
