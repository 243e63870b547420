"""MSA-Conv: a convolution layer in which each pixel first attends to its kernel's pixels."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.grid import grid_attention
from regard.attention.grid_plan import Axis
from regard.attention.grid_slots import slot_scores, slot_sum
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.mechanisms.base import check_rate
from regard.mechanisms.grid.base import GridMechanism

Pair = int | Sequence[int]


def neighbourhood_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: Pair, dilation: Pair = 1, scale: float | None = None, *, border: str
) -> Tensor:
    """Attention of every pixel to the kernel centred on it, (B, H, W, heads, D) to the same; see `MSAConv2d`.

    In tiles: the weights are never made.
    """
    axes = _axes(q, kernel_size, dilation, border)
    return grid_attention(q, _bordered(k, axes), _bordered(v, axes), axes, scale=scale).out


def neighbourhood_dot(q: Tensor, k: Tensor, kernel_size: Pair, dilation: Pair = 1) -> Tensor:
    """``q_i · k_{i + t}`` for every offset t of the kernel, zeros beyond the border.

    (B, H, W, heads, D) to (B, H, W, heads, kh · kw), offsets in row-major order.
    """
    axes = _axes(q, kernel_size, dilation, "zeros")
    return slot_scores(q, _bordered(k, axes), axes, scale=1.0)


def neighbourhood_sum(weights: Tensor, v: Tensor, kernel_size: Pair, dilation: Pair = 1) -> Tensor:
    """``Σ_t w_{i,t} v_{i + t}``: (B, H, W, heads, kh · kw) and (B, H, W, heads, D) to (B, H, W, heads, D)."""
    axes = _axes(v, kernel_size, dilation, "zeros")
    return slot_sum(weights, _bordered(v, axes), axes)


class MSAConv2d(GridMechanism):
    """MSA-Conv of TiC (arXiv:2310.04134): attention inside the kernel, then the convolution. (B, H, W, C), any size.

        z_i = x_i + Σ_t softmax_t(q_i · k_{i+t} / √D) v_{i+t}        y = ReLU(conv(z))

    t goes over the kh×kw kernel centred on i, its steps ``dilation`` pixels apart. Beyond the border keys and values
    are zeros that take part in the softmax; with ``border="mask"`` they do not. The convolution has the same kernel
    without dilation. Exact, cost O(H W C (kh kw + C)); linear
    in pixels, and without positions that would tie it to a size.

    Args:
        in_channels, out_channels: C and that of the output.
        kernel_size: odd, one number or (kh, kw).
        stride, padding: of the convolution; padding is kernel_size // 2 by default.
        dilation: of the attention, one number or one per axis.
        num_heads: 1 as published; in_channels for attention of every channel by itself.
        bias: of the convolution.
        attn_drop: dropout of the weights in training, for which they are made: O(H W kh kw) memory.
        border: "zeros" or "mask".
    """

    cost: ClassVar[str] = "O(N C (k² + C))"
    example: ClassVar[dict[str, Any]] = {"in_channels": 64, "out_channels": 64, "kernel_size": 5}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        num_heads: int = 1,
        bias: bool = False,
        attn_drop: float = 0.1,
        border: str = "zeros",
    ):
        super().__init__()
        if num_heads < 1 or in_channels % num_heads:
            raise ArgumentError(f"num_heads: {num_heads} heads do not divide in_channels {in_channels}")
        kernel = _pair("kernel_size", kernel_size)
        if any(n % 2 == 0 for n in kernel):
            raise ArgumentError(f"kernel_size: expected odd sizes, which have a centre, got {kernel_size}")
        if border not in ("zeros", "mask"):
            raise ArgumentError(f"border: expected 'zeros' or 'mask', got {border!r}")
        around = (kernel[0] // 2, kernel[1] // 2) if padding is None else _pair("padding", padding, 0)
        self.dim, self.num_heads, self.kernel_size, self.border = in_channels, num_heads, kernel, border
        self.dilation, self.attn_drop = _pair("dilation", dilation), check_rate("attn_drop", attn_drop)
        self.qkv = nn.Linear(in_channels, 3 * in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, _pair("stride", stride), around, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv((x + self.attend(x)).movedim(-1, 1))
        return F.relu(y).movedim(1, -1)

    def attend(self, x: Tensor) -> Tensor:
        """The attention alone, without residual and convolution: (B, H, W, C) to the same."""
        q, k, v = self._qkv(x)
        if self.training and self.attn_drop > 0:
            weights = F.dropout(self._weights(q, k), self.attn_drop)
            axes = _axes(q, self.kernel_size, self.dilation, self.border)
            return slot_sum(weights, _bordered(v, axes), axes).flatten(-2)
        return neighbourhood_attention(q, k, v, self.kernel_size, self.dilation, border=self.border).flatten(-2)

    def weights(self, x: Tensor) -> Tensor:
        """The softmax itself, (B, H, W, heads, kh · kw), to look at.

        Offsets are in row-major order; with ``border="mask"`` those inside the image come first.
        """
        return self._weights(*self._qkv(x)[:2])

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        axes = _axes(q, self.kernel_size, self.dilation, self.border)
        return slot_scores(q, _bordered(k, axes), axes).softmax(-1)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        input_channel: int,
        output_channel: int,
        kernel_size: Pair,
        stride: Pair = 1,
        dilation: Pair = 1,
        dropout: float = 0.1,
        im2col_step: int = 7,
        padding: Pair = 1,
        bias: bool = False,
    ) -> "MSAConv2d":
        """Weights and arguments of the published ``MSA_Conv_2d``; ``im2col_step`` changes nothing."""
        module = cls(input_channel, output_channel, kernel_size, stride, padding, dilation, 1, bias, dropout)
        load_strictly(module, state_dict, {"qkv_conv": "qkv", "mlp": "conv"})
        return module


def _axes(x: Tensor, kernel_size: Pair, dilation: Pair, border: str) -> tuple[Axis, ...]:
    mode = "pad" if border == "zeros" else "cut"
    sizes = zip(x.shape[1:3], _pair("kernel_size", kernel_size), _pair("dilation", dilation), strict=True)
    return tuple(Axis(length, window, gap, border=mode) for length, window, gap in sizes)


def _bordered(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """(B, H, W, heads, D) with the zeros that the axes want around it."""
    down, right = ((axis.key_length - axis.length) // 2 for axis in axes)
    return F.pad(x, (0, 0, 0, 0, right, right, down, down))


def _pair(name: str, given: Any, least: int = 1) -> tuple[int, int]:
    pair = (given, given) if isinstance(given, int) else tuple(given)
    if len(pair) != 2 or any(not isinstance(n, int) or n < least for n in pair):
        raise ArgumentError(f"{name}: expected a number of at least {least}, or two of them, got {given!r}")
    return pair
