"""Neighborhood attention: every token of a grid attends to a window of its nearest neighbours."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import Partial, attention, merge
from regard.attention.grid import grid_attention
from regard.attention.grid_plan import Axis, stopping
from regard.attention.grid_slots import slot_scores, slot_sum
from regard.attention.natten import natten_attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, per_head
from regard.masks.neighborhood import neighborhood_axes
from regard.mechanisms.grid.base import GridMechanism

PerAxis = int | Sequence[int]
_BACKENDS = ("auto", "tiles", "blocks", "natten")


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of every grid token to its neighbourhood (arXiv:2204.07143, 2209.15001, 2403.04690, 2504.16922).

        y_i = Σ_{j ∈ ρ(i)} softmax_j(scale q_i·k_j + rpb[j - i]) v_j

    ρ(i) is what `regard.masks.neighborhood` allows: windows that stop at the borders, among the tokens of equal
    remainder modulo ``dilation``, shared by ``stride`` queries; per axis. Exact, differentiable once, in time and
    memory O(N Π(kernel_size + tile)): no N×N and no N×window matrix, neither forward nor backward.

    Args:
        query: (B, *grid, H, D), a grid of one to three axes.
        key, value: (B, *grid, Hk, D or E), where Hk divides H.
        kernel_size, dilation, stride, is_causal: one value, or one per axis.
        scale: 1/√D by default.
        rpb: relative position bias (H, 2·kernel_size - 1 per axis), in units of the dilation; not with causal axes
            or strides.
        additional_keys, additional_values: (B, M, Hk, D or E), tokens that all queries see besides, in one softmax.
        return_lse: also return the log-sum-exp (B, *grid, H), as a `Partial`.
        backend: "tiles" (`regard.attention.grid`), "blocks" (the mask on the sequence of all tokens), or "auto": tiles,
            except on one axis without dilation, where the keys of a tile are one run and blocks are faster. "natten"
            runs the kernels of that package, for GPUs; it has to be asked for.

    Returns:
        (B, *grid, H, E), or with return_lse a `Partial`.

    Raises:
        ShapeError: shapes do not fit together.
        ArgumentError: a window does not fit the grid, or a stride its window.
        Unsupported: rpb with causal axes or strides, or with backend="blocks" or "natten".
        MissingExtra: backend="natten" without that package.
    """
    axes = _axes(query, key, value, kernel_size, dilation, stride, is_causal)
    grid = tuple(query.shape[1:-2])
    if backend not in _BACKENDS:
        raise ArgumentError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    _check_bias(rpb, axes, query.shape[-2])
    if rpb is not None and backend in ("blocks", "natten"):
        raise Unsupported(f"backend: {backend!r} takes no rpb; use 'tiles'")
    more = _additional(query, key, value, additional_keys, additional_values)
    if backend == "auto":
        run = len(axes) == 1 and axes[0].dilation == 1 and rpb is None and not torch.compiler.is_compiling()
        backend = "blocks" if run else "tiles"
    if backend == "blocks":
        mask = masks.neighborhood(grid, kernel_size, dilation, stride, is_causal)
        flat = (_tokens(t) for t in (query, key, value))
        found = _on_grid(attention(*flat, mask=mask, scale=scale, return_lse=True), grid)
    elif backend == "natten":
        found = natten_attention(query, key, value, axes, scale=scale)
    else:
        center = [a.window - 1 for a in axes]
        found = grid_attention(query, key, value, axes, bias=rpb, bias_center=center, scale=scale)
    if more is not None:
        rest = _on_grid(attention(_tokens(query), *more, scale=scale, return_lse=True), grid)
        found = merge(found, rest)
    return found if return_lse else found.out


def neighborhood_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """The scores of `neighborhood_attention`, for those who need weights: (B, *grid, H, Π kernel_size + M).

    Slots are in row-major order from the first key of the window, then the additional keys; slots that a causal window
    leaves empty are ``-inf``.
    """
    axes = _axes(query, key, key, kernel_size, dilation, stride, is_causal)
    _check_bias(rpb, axes, query.shape[-2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = slot_scores(query, key, axes, bias=rpb, bias_center=[a.window - 1 for a in axes], scale=scale)
    if additional_keys is None:
        return scores
    more = torch.einsum("bnhd,bmhd->bnhm", query.flatten(1, -3) * scale, additional_keys)
    return torch.cat([scores, more.view(*query.shape[:-1], -1)], -1)


def neighborhood_av(
    weights: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """``Σ_slots weights v`` with weights in the slots of `neighborhood_qk`: (B, *grid, H, E)."""
    axes = _axes(value, value, value, kernel_size, dilation, stride, is_causal)
    window = 1
    for axis in axes:
        window *= axis.window
    y = slot_sum(weights[..., :window], value, axes)
    if additional_values is None:
        return y
    return y + torch.einsum("b...hm,bmhd->b...hd", weights[..., window:], additional_values)


class NeighborhoodAttention(GridMechanism):
    """`neighborhood_attention` with its projections, as in NAT, DiNAT and NATTEN: x (B, *grid, C) to the same.

    Args:
        dim: C.
        num_heads: H.
        kernel_size, dilation, stride, is_causal: of the window, one value or one per axis of the grid.
        rel_pos_bias: learned biases of relative positions.
        qkv_bias: of the query, key and value projection.
        scale: 1/√head_dim by default.
        axes: of the grid. None: as many as x has, or 2 with rel_pos_bias.
    """

    cost: ClassVar[str] = "O(N C² + N k^axes C)"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: PerAxis = 7,
        dilation: PerAxis = 1,
        stride: PerAxis = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        axes: int | None = None,
    ):
        super().__init__()
        per_head(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.kernel_size, self.dilation, self.stride, self.is_causal = kernel_size, dilation, stride, is_causal
        self.scale = scale
        settings = (kernel_size, dilation, stride, is_causal)
        given = {len(each) for each in settings if isinstance(each, Sequence)}
        given |= set() if axes is None else {axes}
        if len(given) > 1:
            raise ArgumentError(f"axes: expected one number of axes for all arguments, got {sorted(given)}")
        self.axes = next(iter(given), 2 if rel_pos_bias else None)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            assert self.axes is not None
            sizes = [kernel_size] * self.axes if isinstance(kernel_size, int) else list(kernel_size)
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in sizes)))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim or (x.dim() - 2 != self.axes if self.axes else x.dim() not in (3, 4, 5)):
            grid = "*grid" if self.axes is None else f"{self.axes} axes"
            raise ShapeError(f"x: expected (B, {grid}, {self.dim}), got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        settings = (self.kernel_size, self.dilation, self.stride, self.is_causal)
        return self.proj(neighborhood_attention(q, k, v, *settings, self.scale, rpb=self.rpb).flatten(-2))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        num_heads: int,
        kernel_size: PerAxis,
        dim: int | None = None,
        embed_dim: int | None = None,
        dilation: PerAxis | None = 1,
        stride: PerAxis = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        variant: str | None = None,
        **_: Any,
    ) -> "NeighborhoodAttention":
        """Weights of NATTEN's ``NeighborhoodAttention1D``, ``2D`` or ``3D``, old (with rpb) or new (with strides)."""
        rpb = state_dict.get("rpb")
        width = embed_dim if dim is None else dim
        if width is None:
            raise ArgumentError("dim: expected the number of channels, got None")
        axes = None if rpb is None else rpb.dim() - 1
        module = cls(
            width,
            num_heads,
            kernel_size,
            1 if dilation is None else dilation,
            stride,
            is_causal,
            rel_pos_bias,
            qkv_bias,
            qk_scale,
            axes,
        )
        load_strictly(module, state_dict)
        return module


def _axes(q: Tensor, k: Tensor, v: Tensor, size: Any, dilation: Any, stride: Any, causal: Any) -> tuple[Axis, ...]:
    found = neighborhood_axes(
        _checked(q, k, v), size, dilation, stride, causal, window_name="kernel_size", causal_name="is_causal"
    )
    return stopping(found)


def _checked(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The grid, if the tensors fit together."""
    if query.dim() not in (4, 5, 6):
        raise ShapeError(f"query: expected (B, *grid, H, D) with one to three axes, got {tuple(query.shape)}")
    for name, t, last in (("key", key, query.shape[-1]), ("value", value, value.shape[-1])):
        heads = t.shape[-2] if t.dim() == query.dim() else 0
        expected = (*query.shape[:-2], key.shape[-2] if name == "value" else heads, last)
        if tuple(t.shape) != expected or heads == 0 or query.shape[-2] % heads:
            raise ShapeError(
                f"{name}: expected (B, *grid, Hk, D) to go with query {tuple(query.shape)}, got {tuple(t.shape)}"
            )
        if t.dtype != query.dtype:
            raise ArgumentError(f"{name}: expected {query.dtype} like query, got {t.dtype}")
    return tuple(query.shape[1:-2])


def _check_bias(rpb: Tensor | None, axes: tuple[Axis, ...], heads: int) -> None:
    if rpb is None:
        return
    if any(a.causal or a.stride > 1 for a in axes):
        raise Unsupported("rpb: relative position biases are undefined with causal axes or strides")
    expected = (heads, *(2 * a.window - 1 for a in axes))
    if tuple(rpb.shape) != expected:
        raise ShapeError(f"rpb: expected {expected}, got {tuple(rpb.shape)}")


def _additional(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if keys is None and values is None:
        return None
    if keys is None or values is None:
        raise ArgumentError("additional_keys, additional_values: expected both or neither, got one")
    for name, t, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        expected = (query.shape[0], keys.shape[1], *like.shape[-2:])
        if tuple(t.shape) != expected:
            raise ShapeError(f"{name}: expected {expected}, got {tuple(t.shape)}")
    return keys.transpose(1, 2), values.transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """(B, *grid, H, D) to (B, H, N, D)."""
    return x.flatten(1, -3).transpose(1, 2)


def _on_grid(found: Partial, grid: tuple[int, ...]) -> Partial:
    return Partial(found.out.transpose(1, 2).unflatten(1, grid), found.lse.transpose(1, 2).unflatten(1, grid))
