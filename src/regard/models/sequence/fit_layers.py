"""The layers of far-reaching interleaved transformers (arXiv:2305.12689), which their three models share."""

import math
import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers import merge_heads, split_heads
from regard.layers.dropout import dropout_attention
from regard.layers.grid import DropPath
from regard.masks import Mask, blockwise_causal, causal

EPS = 1e-6
Positions = Literal["learned", "sin_cos", "sin_cos2d"]


class Attention(nn.Module):
    """Attention of x (B, N, dim) to a context (B, M, context_dim), in heads of ``inner_dim // num_heads``."""

    def __init__(self, dim: int, context_dim: int, inner_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if not 1 <= num_heads <= inner_dim:
            raise ArgumentError(f"num_heads: expected 1 to {inner_dim} (the width), got {num_heads}")
        wide = inner_dim // num_heads * num_heads
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj = nn.Linear(dim, wide)
        self.k_proj, self.v_proj = (nn.Linear(context_dim, wide) for _ in range(2))
        self.o_proj = nn.Linear(wide, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Mask | None = None) -> Tensor:
        q, k, v = (
            split_heads(proj(t), self.num_heads)
            for proj, t in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        return self.o_proj(merge_heads(dropout_attention(q, k, v, self.dropout if self.training else 0.0, mask)))


class ResidualMLP(nn.Module):
    """``x + W2 GELU(W1 LN(x))``."""

    def __init__(self, dim: int, mlp_ratio: int, dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.fc1, self.fc2 = nn.Linear(dim, dim * mlp_ratio), nn.Linear(dim * mlp_ratio, dim)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc2(self.dropout(F.gelu(self.fc1(self.norm(x))))))


class SelfLayer(nn.Module):
    """``x + attention(LN(x))``, unless without attention, then the MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        attention: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS) if attention else None
        self.attn = Attention(dim, dim, dim, num_heads, attention_dropout) if attention else None
        self.mlp = ResidualMLP(dim, mlp_ratio, dropout, drop_path)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        if self.attn is not None and self.norm is not None:
            normed = self.norm(x)
            x = x + self.drop_path(self.attn(normed, normed, mask))
        return self.mlp(x)


class CrossLayer(nn.Module):
    """``x + attention(LN(x), LN(context))``, with an MLP after it where ``mlp_ratio`` is given."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        inner_dim: int,
        num_heads: int,
        mlp_ratio: int | None = None,
        context_norm: bool = True,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.context_norm = nn.LayerNorm(context_dim, eps=EPS) if context_norm else nn.Identity()
        self.attn = Attention(dim, context_dim, inner_dim, num_heads)
        self.mlp = ResidualMLP(dim, mlp_ratio) if mlp_ratio else nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.mlp(x + self.attn(self.norm(x), self.context_norm(context)))


class Stage(nn.Module):
    """Local layers, and where there are global ones: latents read, are conditioned, mix, and are read."""

    def __init__(self, local: nn.ModuleList):
        super().__init__()
        self.local = local
        self.mix = nn.ModuleList()
        self.read: CrossLayer | None = None
        self.condition: CrossLayer | None = None
        self.write: CrossLayer | None = None


class Interleaved(nn.Module):
    """Tokens in groups (B, t, n, dim) and latents (B, t, m, latent_dim), to the same.

    Each stage: tokens of a group attend to each other; the group's latents read them; all latents attend to each
    other; the group's tokens read its latents, but not in the last stage. Local attention costs O(L n), global
    O((t m)²) and cross O(L m) for L = t n tokens: with m fixed and n ~ L^⅓, O(L^{4/3}).

    Args:
        layers: numbers of local (in brackets) and global layers by turns, such as "(2)4(2)".
        dim, latent_dim, num_heads, latent_num_heads: of tokens and of latents; what links them has the smaller ones.
        mlp_ratio: hidden width by width.
        causal_local: tokens see no later ones of their group.
        chunk: latents of a group, if they shall see no later groups; None if all see all.
        shift: tokens read the latents of the group before, zeros in the first one.
        conditioned: latents read condition tokens of width ``latent_dim`` too.
        local_attention: local layers are MLPs only if not.
        cross_mlp, context_norm: of the layers between tokens and latents.
        dropout, attention_dropout, drop_path: of the local and global layers.
    """

    def __init__(
        self,
        layers: str,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_num_heads: int,
        mlp_ratio: int = 4,
        *,
        causal_local: bool = False,
        chunk: int | None = None,
        shift: bool = False,
        conditioned: bool = False,
        local_attention: bool = True,
        cross_mlp: bool = False,
        context_norm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.local_mask = causal() if causal_local else None
        self.latent_mask = None if chunk is None else blockwise_causal(chunk)
        self.shift = shift
        inner, heads = min(dim, latent_dim), min(num_heads, latent_num_heads)
        ratio = mlp_ratio if cross_mlp else None
        rates = (dropout, attention_dropout, drop_path)
        self.stages = nn.ModuleList()
        counts = parse_layers(layers)
        for i, (local, mix) in enumerate(counts):
            many = (SelfLayer(dim, num_heads, mlp_ratio, local_attention, *rates) for _ in range(local))
            stage = Stage(nn.ModuleList(many))
            if mix:
                stage.read = CrossLayer(latent_dim, dim, inner, heads, ratio, context_norm)
                stage.mix.extend(SelfLayer(latent_dim, latent_num_heads, mlp_ratio, True, *rates) for _ in range(mix))
                if conditioned:
                    stage.condition = CrossLayer(
                        latent_dim, latent_dim, latent_dim, latent_num_heads, None, context_norm
                    )
            if i < len(counts) - 1:
                stage.write = CrossLayer(dim, latent_dim, inner, heads, ratio, context_norm)
            self.stages.append(stage)

    def forward(self, x: Tensor, latents: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        groups = x.shape[1]
        x, latents = x.flatten(0, 1), latents.flatten(0, 1)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for layer in stage.local:
                x = layer(x, self.local_mask)
            if stage.read is not None:
                latents = stage.read(latents, x).unflatten(0, (-1, groups))
                size = latents.shape[1:3]
                together = latents.flatten(1, 2)
                if stage.condition is not None and condition is not None:
                    together = stage.condition(together, condition)
                for layer in stage.mix:
                    together = layer(together, self.latent_mask)
                latents = together.unflatten(1, size)
                if stage.write is not None:
                    source = F.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0)) if self.shift else latents
                    x = stage.write(x, source.flatten(0, 1))
                latents = latents.flatten(0, 1)
        return x.unflatten(0, (-1, groups)), latents.unflatten(0, (-1, groups))


class PositionTable(nn.Module):
    """One vector per place of a grid of rows and columns, learned or a code of sines and cosines."""

    def __init__(self, kind: Positions, rows: int, columns: int, dim: int, name: str = "positions"):
        super().__init__()
        if kind == "sin_cos2d":
            side = math.isqrt(rows * columns)
            if side * side != rows * columns:
                raise ArgumentError(
                    f"{name}: sin_cos2d needs a square number of tokens in a group, got {rows * columns}"
                )
            rows = columns = side
        self.table: Tensor
        if kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(rows * columns, dim), std=0.02))
        elif kind in ("sin_cos", "sin_cos2d"):
            self.register_buffer("table", grid_code(rows, columns, dim), persistent=False)
        else:
            raise ArgumentError(f"{name}: expected learned, sin_cos or sin_cos2d, got {kind!r}")

    def forward(self) -> Tensor:
        return self.table


def sin_cos_code(places: Tensor, dim: int) -> Tensor:
    """(...) to (..., dim): all sines, then all cosines, of ``place / 10000^(2i / dim)``."""
    i = torch.arange(dim, device=places.device)
    angles = places.float()[..., None] * (1 / 10000.0 ** ((2 * (i // 2)).float() / dim))
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)


def grid_code(rows: int, columns: int, dim: int) -> Tensor:
    """(rows · columns, dim), coordinates from 0 to 1000; with two dimensions half of the channels for each."""

    def places(count: int) -> Tensor:
        return torch.arange(count).float() / max(1, count - 1) * 1000.0

    if rows == 1 or columns == 1:
        return sin_cos_code(places(rows * columns), dim)
    if dim % 2:
        raise ArgumentError(f"dim: a code of rows and columns needs an even width, got {dim}")
    row, column = (sin_cos_code(places(count), dim // 2) for count in (rows, columns))
    return torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], -1).flatten(0, 1)


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """ "(2)4(1)" to [(2, 4), (1, 0)]: local and global layers of each stage.

    Raises:
        ArgumentError: it does not read so, or only the last stage may lack global layers and another does.
    """
    if not re.fullmatch(r"(\(\d+\)\d+)*\(\d+\)\d*", layers):
        raise ArgumentError(f"layers: expected local and global counts such as '(2)4(2)', got {layers!r}")
    stages = [(int(local), int(mix or 0)) for local, mix in re.findall(r"\((\d+)\)(\d*)", layers)]
    if not all(mix for _, mix in stages[:-1]):
        raise ArgumentError(f"layers: only the last stage may have 0 global layers, got {layers!r}")
    return stages


def group_size(num_tokens: int, num_groups: int, latents_per_group: int) -> int:
    """Tokens of a group."""
    if num_groups < 1 or num_tokens < 1 or num_tokens % num_groups:
        raise ArgumentError(f"num_groups: {num_groups} groups do not divide {num_tokens} tokens")
    if latents_per_group < 1:
        raise ArgumentError(f"latents_per_group: expected at least 1, got {latents_per_group}")
    return num_tokens // num_groups
