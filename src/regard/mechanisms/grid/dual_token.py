"""DualToken-ViT: every position is a convolution's token plus what it reads in a few tokens that stand for places."""

from typing import ClassVar, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, merge_heads, per_head, split_heads
from regard.layers.grid import DepthwiseConv2d, DropPath
from regard.layers.scale import LayerScale


class ConvEncoder(nn.Module):
    """``γ W2 GELU(W1 LN(dwconv(x)))``, a ConvNeXt block (arXiv:2201.03545) without its shortcut.

    (B, H, W, C) to the same.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, kernel_size: int = 7, layer_scale: float | None = None):
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, kernel_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.mlp(self.norm(self.dwconv(x))))


class MixMLP(nn.Module):
    """An MLP along the tokens, the same for every channel; (B, T, C) to the same."""

    def __init__(self, num_tokens: int, hidden_dim: int):
        super().__init__()
        self.mlp = MLP(num_tokens, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.mT).mT


class PositionAwareTokenModule(nn.Module, PyTorchModelHubMixin):
    """Position-aware global tokens: they gather the image, remember, and are read (DualToken-ViT, arXiv:2309.12424).

        Z = x_local, pooled step by step to the grid of the tokens, a 3×3 depthwise convolution before each halving
        A = MHSA(Z)                            aggregation
        G' = α M(G) + (1 - α) A                token (a, b) stays with cell (a, b)
        x_global = Wo MHA(x, G', G')           broadcast

    x_local (B, H, W, C), G (B, T, C), T tokens on a grid, to x_global (B, H, W, C) and G'. Noncausal. Cost
    O(N T C + N C²): linear in the image; an image that is no power of two larger than the grid is pooled the rest of
    the way adaptively.

    No code was published. From the paper's description it is not known where α and M stand, whether α is one number,
    whether A has an output projection (here it has none) and what is normalised; what is an argument below is a guess.

    Args:
        dim, num_heads: C and heads.
        token_grid: rows and columns of the tokens.
        mlp: M, "normal" (along the channels) or "mix" (along the tokens).
        mlp_ratio: its width over its input's.
        alpha: one learned number ("scalar") or one per "channel"; 0.5 at first.
        num_downsamples: halvings that have a convolution; with 0 the image is pooled in one step.
        downsample_norm: LayerNorm after each halving.
        qkv_bias: of queries, keys and values.
    """

    cost: ClassVar[str] = "O(N T C + N C²), T tokens"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        token_grid: tuple[int, int] = (7, 7),
        mlp: Literal["normal", "mix"] = "normal",
        mlp_ratio: float = 1.0,
        alpha: Literal["scalar", "channel"] = "scalar",
        num_downsamples: int = 2,
        downsample_norm: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__()
        per_head(dim, num_heads)
        if len(token_grid) != 2 or min(token_grid) < 1:
            raise ArgumentError(f"token_grid: expected (rows, columns), got {token_grid!r}")
        if mlp not in ("normal", "mix"):
            raise ArgumentError(f"mlp: expected 'normal' or 'mix', got {mlp!r}")
        if alpha not in ("scalar", "channel"):
            raise ArgumentError(f"alpha: expected 'scalar' or 'channel', got {alpha!r}")
        if num_downsamples < 0:
            raise ArgumentError(f"num_downsamples: expected at least 0, got {num_downsamples}")
        self.dim, self.num_heads, self.token_grid = dim, num_heads, (token_grid[0], token_grid[1])
        self.num_tokens = token_grid[0] * token_grid[1]
        self.downsamples = nn.ModuleList(
            nn.ModuleDict(
                {"conv": DepthwiseConv2d(dim), "norm": nn.LayerNorm(dim) if downsample_norm else nn.Identity()}
            )
            for _ in range(num_downsamples)
        )
        self.aggregate = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.mlp: nn.Module = (
            MLP(dim, int(dim * mlp_ratio))
            if mlp == "normal"
            else MixMLP(self.num_tokens, int(self.num_tokens * mlp_ratio))
        )
        self.alpha = nn.Parameter(torch.full((1 if alpha == "scalar" else dim,), 0.5))
        self.q_proj, self.kv_proj = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x_local: Tensor, global_tokens: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_global and the new tokens; the queries are made from ``x`` (B, H, W, C), by default from ``x_local``."""
        if x_local.dim() != 4 or x_local.shape[-1] != self.dim:
            raise ShapeError(f"x_local: expected (B, H, W, {self.dim}), got {tuple(x_local.shape)}")
        expected = (x_local.shape[0], self.num_tokens, self.dim)
        if tuple(global_tokens.shape) != expected:
            raise ShapeError(f"global_tokens: expected {expected}, got {tuple(global_tokens.shape)}")
        if x is not None and x.shape != x_local.shape:
            raise ShapeError(f"x: expected the shape of x_local {tuple(x_local.shape)}, got {tuple(x.shape)}")
        pooled = self.downsample(x_local).flatten(1, 2)
        new = self.alpha * self.mlp(global_tokens) + (1 - self.alpha) * self._attend(
            *self.aggregate(pooled).chunk(3, -1)
        )
        queries = self.q_proj(x_local if x is None else x).flatten(1, 2)
        return self.o_proj(self._attend(queries, *self.kv_proj(new).chunk(2, -1))).view(x_local.shape), new

    def downsample(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, rows, columns, C)."""
        rows, columns = self.token_grid
        for step in self.downsamples:
            if x.shape[1] < 2 * rows or x.shape[2] < 2 * columns:
                break
            assert isinstance(step, nn.ModuleDict)
            x = step["norm"](F.avg_pool2d(step["conv"](x).movedim(-1, 1), 2).movedim(1, -1))
        if tuple(x.shape[1:3]) != self.token_grid:
            x = F.adaptive_avg_pool2d(x.movedim(-1, 1), self.token_grid).movedim(1, -1)
        return x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merge_heads(attention(*(split_heads(t, self.num_heads) for t in (q, k, v))))


class BiDimAttention(nn.Module):
    """``x ∘ c ∘ s``: channels and places are scaled by what each other say (LightViT, arXiv:2207.05557).

        x' = LN x;   g = GELU(Wg mean(x')),   u = GELU(Wu x');   c = σ(Wc g),   s = σ(Ws [u, g])

    (B, H, W, C) to the same; c is one number per channel, s one per place.

    Args:
        dim: C.
        ratio: channels of g and u over C.
    """

    def __init__(self, dim: int, ratio: float = 0.25):
        super().__init__()
        inner = int(dim * ratio)
        if inner < 1:
            raise ArgumentError(f"ratio: expected at least one of {dim} channels, got {ratio}")
        self.norm = nn.LayerNorm(dim)
        self.global_reduce, self.local_reduce = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.channel_select, self.spatial_select = nn.Linear(inner, dim), nn.Linear(2 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        u, g = F.gelu(self.local_reduce(normed)), F.gelu(self.global_reduce(normed.mean((1, 2), keepdim=True)))
        channels = self.channel_select(g).sigmoid()
        places = self.spatial_select(torch.cat([u, g.expand_as(u)], -1)).sigmoid()
        return x * (channels * places)


class DualTokenBlock(nn.Module, PyTorchModelHubMixin):
    """A convolution and position-aware tokens at every position, then an MLP (DualToken-ViT, arXiv:2309.12424).

        y = LN x;   x_local = y + conv(y);   x_global, G' = tokens(x_local, G), with queries from y
        x += conv(y) + x_global;   x += BiDim(MLP(LN x))

    x (B, H, W, C) and G (B, T, C) to the same. Where the shortcut runs is a guess: here it is one, outside the norm;
    ``residual="twice"`` adds x_local as a whole. See `PositionAwareTokenModule` on what else is not known.

    Args:
        dim, num_heads: C and heads.
        mlp_ratio: width of the MLP over C.
        token_grid, mlp, alpha, num_downsamples, downsample_norm: see `PositionAwareTokenModule`.
        token_mlp_ratio: ``mlp_ratio`` there.
        conv_ratio: width inside `ConvEncoder` over C.
        layer_scale: initial scale of the convolution's branch, None for none.
        queries: of the broadcast, from the "input" y or from the "local" tokens.
        residual: "once" or "twice", see above.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        token_grid: tuple[int, int] = (7, 7),
        mlp: Literal["normal", "mix"] = "normal",
        token_mlp_ratio: float = 1.0,
        alpha: Literal["scalar", "channel"] = "scalar",
        num_downsamples: int = 2,
        downsample_norm: bool = False,
        conv_ratio: float = 4.0,
        layer_scale: float | None = None,
        queries: Literal["input", "local"] = "input",
        residual: Literal["once", "twice"] = "once",
        drop_path: float = 0.0,
    ):
        super().__init__()
        if queries not in ("input", "local"):
            raise ArgumentError(f"queries: expected 'input' or 'local', got {queries!r}")
        if residual not in ("once", "twice"):
            raise ArgumentError(f"residual: expected 'once' or 'twice', got {residual!r}")
        self.queries, self.residual = queries, residual
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv = ConvEncoder(dim, conv_ratio, layer_scale=layer_scale)
        self.tokens = PositionAwareTokenModule(
            dim, num_heads, token_grid, mlp, token_mlp_ratio, alpha, num_downsamples, downsample_norm
        )
        self.mlp = nn.Sequential(MLP(dim, int(dim * mlp_ratio)), BiDimAttention(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, global_tokens: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        conv = self.conv(y)
        x_global, new = self.tokens(y + conv, global_tokens, y if self.queries == "input" else None)
        mixed = conv + x_global if self.residual == "once" else y + conv + x_global
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x))), new
