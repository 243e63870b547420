"""FlashVGGT's descriptor attention: all tokens of all frames read small copies of the frames."""

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.layers.grid import Conv2d
from regard.positions import axial_angles, grid_coordinates, pairs_to_halves, rotate

Grid = tuple[int, int]
Compressor = Literal["bilinear", "nearest", "dwconv"]


class Descriptors(NamedTuple):
    """What the queries read, before it is projected; the growing state of a stream.

    Attributes:
        tokens: (B, M, C).
        positions: (B, M, 2) row and column.
    """

    tokens: Tensor
    positions: Tensor


class DescriptorAttention(nn.Module):
    """Global attention over the frames of a scene through pooled descriptors (FlashVGGT, arXiv:2512.01540).

        y = Wo softmax(q kᵀ / √D) v,      q = R(LN(x Wq)),   k = R(LN(z Wk)),   v = z Wv
        z = [patches of the key frames;  of each frame its special tokens and its patches, pooled to ⌊h/r⌋ × ⌊w/r⌋]

    x (B, S, P, C) to the same: S frames of P tokens, the last h·w of which are the patches of a grid and the others
    special (camera, registers). R rotates by row and column (axial); special tokens are at (0, 0), patches at
    (y + 1, x + 1), descriptors at their nearest patch's place. With r = 1 it is dense attention, and with S = 1
    attention inside a frame: one set of weights, VGGT's, serves all. With r > 1 it is an approximation of that.
    Bilinear pooling, as published, reads at most two pixels per axis whatever r is, "dwconv" all of them.

    `stream` takes the frames chunk by chunk: noncausal in a chunk, causal from chunk to chunk. The state holds
    descriptors, not keys, and the patches of the first frame, which is the stream's only key frame.

    Cost O(S²P (P / r²) C) against O(S²P² C).

    Args:
        dim, num_heads: C and H; C / H a multiple of 4.
        kv_downfactor: r.
        qk_norm: LayerNorm on each head of q and k.
        rope_freq: base of the rotary angles; None for none.
        compressor: "bilinear", "nearest", or "dwconv", learned weights per channel that start as the mean.
        qkv_bias, proj_bias: of the projections.
    """

    cost: ClassVar[str] = "O(S²P²C / r²)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kv_downfactor: int = 4,
        qk_norm: bool = True,
        rope_freq: float | None = 100.0,
        compressor: Compressor = "bilinear",
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.head_dim, _ = per_head(dim, num_heads)
        if rope_freq is not None and self.head_dim % 4:
            raise ArgumentError(
                f"num_heads: rotation by row and column needs heads of 4n channels, got {self.head_dim}"
            )
        if kv_downfactor < 1:
            raise ArgumentError(f"kv_downfactor: expected at least 1, got {kv_downfactor}")
        if compressor not in ("bilinear", "nearest", "dwconv"):
            raise ArgumentError(f"compressor: expected bilinear, nearest or dwconv, got {compressor!r}")
        self.kv_downfactor, self.rope_freq, self.compressor = kv_downfactor, rope_freq, compressor
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.o_proj = nn.Linear(dim, dim, bias=proj_bias)
        self.pool = None
        if compressor == "dwconv" and kv_downfactor > 1:
            self.pool = Conv2d(dim, dim, kv_downfactor, kv_downfactor, padding=0, groups=dim, bias=False)
            nn.init.constant_(self.pool.weight, kv_downfactor**-2)

    def forward(
        self, x: Tensor, grid: Grid, *, positions: Tensor | None = None, keyframes: Tensor | None = None
    ) -> Tensor:
        """All frames at once.

        Args:
            x: (B, S, P, C).
            grid: (h, w) of the patches, h·w ≤ P.
            positions: (B, S, P, 2) rows and columns, where they are not those of the grid.
            keyframes: (B, F) frames whose patches are read unpooled as well, one that is named twice twice; none by
                default. Dense attention (r = 1) has no use for them.
        """
        positions = self._positions(x, grid, positions)
        return self._attend(x, positions, self.descriptors(x, grid, positions, keyframes))

    def stream(
        self,
        x: Tensor,
        grid: Grid,
        state: Descriptors | None = None,
        *,
        positions: Tensor | None = None,
        drop_rate: int = 1,
    ) -> tuple[Tensor, Descriptors]:
        """The next frames, which read themselves and the frames before; of a chunk every ``drop_rate``-th is kept."""
        if drop_rate < 1:
            raise ArgumentError(f"drop_rate: expected at least 1, got {drop_rate}")
        positions = self._positions(x, grid, positions)
        first = x.new_zeros(x.shape[0], 1, dtype=torch.long) if state is None else None
        new = self.descriptors(x, grid, positions, first, drop_rate)
        if state is not None:
            new = Descriptors(*(torch.cat(pair, 1) for pair in zip(state, new, strict=True)))
        return self._attend(x, positions, new), new

    def descriptors(
        self, x: Tensor, grid: Grid, positions: Tensor, keyframes: Tensor | None = None, drop_rate: int = 1
    ) -> Descriptors:
        """What queries read of these frames: patches of key frames, then the frames in order."""
        if self.kv_downfactor == 1:
            return Descriptors(*(t[:, ::drop_rate].flatten(1, 2) for t in (x, positions)))
        if keyframes is not None and (
            keyframes.dim() != 2 or len(keyframes) != len(x) or keyframes.is_floating_point()
        ):
            raise ShapeError(
                f"keyframes: expected integers ({len(x)}, F), got {keyframes.dtype} {tuple(keyframes.shape)}"
            )
        special = x.shape[2] - grid[0] * grid[1]
        pooled = []
        for tensor, mode in ((x, self.compressor), (positions, "nearest")):
            patches = self._pool(tensor[:, ::drop_rate, special:].unflatten(2, grid), mode)
            parts = [torch.cat([tensor[:, ::drop_rate, :special], patches], 2).flatten(1, 2)]
            if keyframes is not None:
                batch = torch.arange(len(tensor), device=x.device)[:, None]
                parts.insert(0, tensor[batch, keyframes, special:].flatten(1, 2))
            pooled.append(torch.cat(parts, 1))
        return Descriptors(*pooled)

    def _pool(self, patches: Tensor, mode: str) -> Tensor:
        """(B, S, h, w, ·) to (B, S, ⌊h/r⌋·⌊w/r⌋, ·)."""
        flat = patches.flatten(0, 1)
        if mode == "dwconv":
            assert self.pool is not None
            small = self.pool(flat)
        else:
            size = (flat.shape[1] // self.kv_downfactor, flat.shape[2] // self.kv_downfactor)
            exact = flat.movedim(-1, 1).to(torch.promote_types(flat.dtype, torch.float32))
            align = False if mode == "bilinear" else None
            small = F.interpolate(exact, size, mode=mode, align_corners=align).movedim(1, -1).to(flat.dtype)
        return small.flatten(1, 2).unflatten(0, patches.shape[:2])

    def _attend(self, x: Tensor, positions: Tensor, read: Descriptors) -> Tensor:
        q = self.q_norm(split_heads(self.q_proj(x.flatten(1, 2)), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(read.tokens), self.num_heads))
        v = split_heads(self.v_proj(read.tokens), self.num_heads)
        y = attention(self._rotate(q, positions.flatten(1, 2)), self._rotate(k, read.positions), v)
        return self.o_proj(merge_heads(y)).view(x.shape)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rope_freq is None:
            return x
        f = self.head_dim // 4
        frequencies = self.rope_freq ** (-torch.arange(f, device=x.device, dtype=torch.float32) / f)
        cos, sin = axial_angles(positions.flatten(0, 1), frequencies)
        return rotate(x, *(angle.unflatten(0, positions.shape[:2]).unsqueeze(1) for angle in (cos, sin)))

    def _positions(self, x: Tensor, grid: Grid, positions: Tensor | None) -> Tensor:
        """Checks the arguments; (B, S, P, 2)."""
        height, width = grid
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, S, P, {self.dim}), got {tuple(x.shape)}")
        if min(grid) < self.kv_downfactor or height * width > x.shape[2]:
            least = f"at least {self.kv_downfactor} (kv_downfactor) each way"
            raise ArgumentError(f"grid: expected {least} and at most {x.shape[2]} patches, got {height} x {width}")
        if positions is None:
            patches = grid_coordinates(height, width, device=x.device) + 1
            special = patches.new_zeros(x.shape[2] - height * width, 2)
            return torch.cat([special, patches]).expand(*x.shape[:3], 2)
        if positions.shape != (*x.shape[:3], 2):
            raise ShapeError(f"positions: expected {(*x.shape[:3], 2)}, got {tuple(positions.shape)}")
        return positions

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        rope_freq: float | None = 100.0,
        kv_downfactor: int = 1,
        compressor_type: Compressor = "bilinear",
    ) -> "DescriptorAttention":
        """The published ``Attention``, VGGT's too; ``rope_freq`` is the base of the module given to it as ``rope``."""
        rope = rope_freq if rope_freq is not None and rope_freq > 0 else None
        module = cls(dim, num_heads, kv_downfactor, qk_norm, rope, compressor_type, qkv_bias, proj_bias)
        load_strictly(module, own_names(state_dict, num_heads, rope is not None), {"proj": "o_proj"})
        return module


def own_names(state: dict[str, Tensor], num_heads: int, rope: bool, prefix: str = "") -> dict[str, Tensor]:
    """The published attention's weights with q, k, v apart and their channels in the order of `axial_angles`."""
    state = dict(state)
    split_rows(state, f"{prefix}qkv", tuple(f"{prefix}{name}" for name in ("q_proj", "k_proj", "v_proj")))
    if (weight := state.pop(f"{prefix}spatial_compressor.compressor.weight", None)) is not None:
        state[f"{prefix}pool.weight"] = weight
    for name, heads in (("q_proj", num_heads), ("k_proj", num_heads), ("q_norm", 1), ("k_norm", 1)):
        for kind in ("weight", "bias"):
            if rope and (key := f"{prefix}{name}.{kind}") in state:
                state[key] = pairs_to_halves(state[key], heads, axes=2, interleaved=False)
    return state


@torch.no_grad()
def select_keyframes(tokens: Tensor, every: int = 10, seed: int = 42, iterations: int = 100) -> Tensor:
    """Frames that stand for all: the first, and those nearest to the centres of k-means over the frames' mean tokens.

    Args:
        tokens: (B, S, P, C).
        every: there are ⌊S / every⌋ centres; with one or none the first frame is the only key frame.
        seed: of the frames that the centres start from.
        iterations: at most.

    Returns:
        (B, F) indices; the first frame may be there twice.
    """
    if tokens.dim() != 4:
        raise ShapeError(f"tokens: expected (B, S, P, C), got {tuple(tokens.shape)}")
    if every < 1:
        raise ArgumentError(f"every: expected at least 1, got {every}")
    batch, frames, count = *tokens.shape[:2], tokens.shape[1] // every
    first = torch.zeros(batch, 1, dtype=torch.long, device=tokens.device)
    if count <= 1:
        return first
    points = tokens.mean(2).to(torch.promote_types(tokens.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    start = torch.stack([torch.randperm(frames, generator=generator)[:count] for _ in range(batch)]).to(tokens.device)
    centres = points.gather(1, start[..., None].expand(-1, -1, points.shape[-1]))
    for _ in range(iterations):
        member = F.one_hot(torch.cdist(points, centres).argmin(-1), count).to(points.dtype)  # (B, S, count)
        size = member.sum(1)[..., None]
        moved = torch.where(size > 0, member.mT @ points / size.clamp(min=1), centres)  # nobody's centre stays
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cat([first, torch.cdist(points, centres).argmin(1)], 1)
