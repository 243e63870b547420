"""Magnitude-aware linear attention (MALA): linear attention that sharpens as the query grows, as softmax does."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.layers.conv import CausalDepthwiseConv1d
from regard.layers.grid import DepthwiseConv2d
from regard.linear import elu1, linear_attention
from regard.mechanisms.base import Mechanism, Pattern, legitimate
from regard.mechanisms.grid.base import GridMechanism
from regard.positions import axial_angles, grid_coordinates, pairs_to_halves, rotate, rotate_tokens

_EPS = 1e-6


class MalaState(NamedTuple):
    """Sums over the tokens seen, in float32 or wider.

    Attributes:
        products: (B, H, D, E) of k̃ᵀ v.
        keys: (B, H, D), values: (B, H, E).
        seen: (B,) tokens that were no padding.
        conv: what the convolution of the values still sees, or None without one.
        length: tokens, padding included.
    """

    products: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor
    conv: Tensor | None = None
    length: int = 0


def magnitude_aware_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    turned: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    causal: bool = False,
    valid: Tensor | None = None,
    state: MalaState | None = None,
) -> tuple[Tensor, MalaState]:
    """``o_i = Σ_j (β_i S_ij - γ_i) v_j`` with ``S_ij = scale q_i·k_j / n``, ``z_i = Σ_j S_ij``.

    β = 1 + 1/z and γ = z/n: weights of a row sum to one, may be negative, and spread as q grows.

    Args:
        q: (B, H, N, D) after a positive feature map.
        k: (B, H, M, D) too.
        v: (B, H, M, E).
        turned: rotated q and k, which then take the place of q and k in S, but not in z.
        scale: 1/√D by default.
        causal: sums and n over j ≤ i.
        valid: (B, M) bool; padding is left out of all sums and of n.
        state: from the tokens before, with causal.

    Returns:
        (B, H, N, E), and the state after the last token.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    if valid is None:
        valid = v.new_ones(v.shape[0], v.shape[2], dtype=torch.bool)
    keep = valid[:, None, :, None]
    qt, kt = (q, k) if turned is None else turned
    q, k, v, qt, kt = (t.to(wide) for t in (q, k, v, qt, kt))
    k, v, kt = k * keep, v * keep, kt * keep
    if causal:
        count = keep.cumsum(2)
        keys, values, products = k.cumsum(2), v.cumsum(2), None
        if state is not None:
            count = count + state.seen[:, None, None, None]
            keys, values, products = keys + state.keys[:, :, None], values + state.values[:, :, None], state.products
        out, products = linear_attention(qt, kt, v, state=products)
    else:
        count, keys, values = keep.sum(2, keepdim=True), k.sum(2, keepdim=True), v.sum(2, keepdim=True)
        out, products = linear_attention(qt, kt, v, causal=False)
    n = count.clamp(min=1).to(wide)
    z = scale * (q * keys).sum(-1, keepdim=True) / n
    out = out * (scale / n) * (1 + 1 / (z + _EPS)) - z * values / n
    length = v.shape[2] + (0 if state is None else state.length)
    after = MalaState(products, keys[:, :, -1], values[:, :, -1], count[:, 0, -1, 0], None, length)
    return out.to(dtype), after


class MagnitudeAwareLinearAttention(Mechanism):
    """Linear attention with a scale and an offset in place of the division (MALA, arXiv:2507.00698).

        q, k = φ(x Wq), φ(x Wk), φ = ELU + 1        S_ij = R(i)q_i · R(j)k_j / (n √D)        z_i = q_i · mean_j k_j / √D
        y = Wo ((Σ_j (β_i S_ij - z_i / n) v_j + conv(v)_i) ∘ x Wg)                        β_i = 1 + 1 / z_i

    Dividing by z would cancel the length of q; here a longer query spreads its weights, as with softmax. Rows sum to
    one exactly without rotation. x (B, N, C) to (B, N, C), noncausal, or causal with running sums (used in the paper
    for language, unpublished code; the definition here is ours). `GridMagnitudeAwareAttention` is the form for images.

    Args:
        dim: C.
        num_heads: H.
        head_dim: D, C / H by default.
        causal: sums over the past only.
        rope_theta: base of the rotary frequencies; None for none.
        lepe_kernel: taps of the depthwise convolution of the values; 0 for none.
        output_gate: whether there is Wg.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N C D)"
    state: ClassVar = "constant"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = True,
        rope_theta: float | None = 10_000.0,
        lepe_kernel: int = 5,
        output_gate: bool = True,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads, head_dim)
        if lepe_kernel < 0 or (lepe_kernel and lepe_kernel % 2 == 0):
            raise ArgumentError(f"lepe_kernel: expected 0 or an odd number, got {lepe_kernel}")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.rope_theta = rope_theta
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.gate_proj = nn.Linear(dim, inner) if output_gate else None
        self.lepe: nn.Module | None = None
        if lepe_kernel:
            around: dict[str, Any] = {"padding": lepe_kernel // 2, "groups": inner}
            self.lepe = (
                CausalDepthwiseConv1d(inner, lepe_kernel) if causal else nn.Conv1d(inner, inner, lepe_kernel, **around)
            )
        self.o_proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._attend(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: MalaState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, MalaState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._attend(x, state, valid)

    def _attend(self, x: Tensor, state: MalaState | None, valid: Tensor | None) -> tuple[Tensor, MalaState]:
        values = self.v_proj(x) if valid is None else self.v_proj(x) * valid.unsqueeze(-1)
        q, k, v = (split_heads(t, self.num_heads) for t in (elu1(self.q_proj(x)), elu1(self.k_proj(x)), values))
        past = 0 if state is None else state.length
        turned = (rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past))
        out, after = magnitude_aware_linear_attention(
            q, k, v, turned=turned, causal=self.causal, valid=valid, state=state
        )
        y = merge_heads(out)
        if isinstance(self.lepe, CausalDepthwiseConv1d):
            local, conv = self.lepe.stream(values, None if state is None else state.conv)
            y, after = y + local, after._replace(conv=conv)
        elif self.lepe is not None:
            y = y + self.lepe(values.mT).mT
        return self.o_proj(y if self.gate_proj is None else y * self.gate_proj(x)), after


class GridMagnitudeAwareAttention(GridMechanism):
    """`MagnitudeAwareLinearAttention` on images: x (B, H, W, C) to the same, at any size.

    Rotary angles per row and column, a k×k depthwise convolution of the values, always gated. With ``linear=False`` the
    same layer with softmax, as the published backbones have it where images are small.

    Args:
        dim: C.
        num_heads: heads of a multiple of 4 channels.
        linear: False for softmax attention on raw q and k.
        lepe_kernel: size of the convolution.
    """

    cost: ClassVar[str] = "O(N C D), with softmax O(N² C); N = H W"

    def __init__(self, dim: int, num_heads: int, linear: bool = True, lepe_kernel: int = 5):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if self.head_dim % 4:
            raise ArgumentError(f"num_heads: heads of {self.head_dim} channels, expected a multiple of 4")
        self.dim, self.num_heads, self.linear = dim, num_heads, linear
        self.qkvo = nn.Linear(dim, 4 * dim)
        self.lepe = DepthwiseConv2d(dim, lepe_kernel)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        q, k, v, gate = self.qkvo(x).chunk(4, -1)
        local = self.lepe(v)
        q, k, v = (split_heads(t.flatten(1, 2), self.num_heads) for t in (q, k, v))
        cos, sin = self._angles(x)
        if self.linear:
            q, k = elu1(q), elu1(k)
            turned = rotate(q, cos, sin), rotate(k, cos, sin)
            out, _ = magnitude_aware_linear_attention(q, k, v, turned=turned)
        else:
            out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj((merge_heads(out).view_as(local) + local) * gate)

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, dim: int, num_heads: int, linear: bool = True, **_: Any
    ) -> "GridMagnitudeAwareAttention":
        """The published ``AddLinearAttention``, or with ``linear=False`` its ``VanillaSelfAttention``."""
        module = cls(dim, num_heads, linear)
        load_strictly(module, halves_of_rows_and_columns(dict(state_dict), num_heads))
        return module

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.linspace(0, 1, self.head_dim // 4, device=x.device)
        return axial_angles(grid_coordinates(x.shape[1], x.shape[2], device=x.device), 10_000.0**-steps)


def halves_of_rows_and_columns(state: dict[str, Tensor], num_heads: int, prefix: str = "") -> dict[str, Tensor]:
    """Published ``qkvo`` rotate neighbouring channels, ours halves; q and k are permuted alike, so nothing changes."""
    for name in (f"{prefix}qkvo.weight", f"{prefix}qkvo.bias"):
        q, k, *rest = state[name].chunk(4)
        state[name] = torch.cat([*(pairs_to_halves(t, num_heads, axes=2) for t in (q, k)), *rest])
    return state
