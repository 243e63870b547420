"""FlashVGGT's aggregator: attention inside frames and between them in turn (arXiv:2512.01540)."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import Conv2d
from regard.layers.scale import LayerScale
from regard.mechanisms.pooled.descriptor import (
    Compressor,
    DescriptorAttention,
    Descriptors,
    Grid,
    own_names,
    select_keyframes,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrameBlock(nn.Module):
    """``x + γ1 attention(LN x)``, then ``x + γ2 MLP(LN x)``, on (B, S, P, C)."""

    def __init__(self, attention: DescriptorAttention, mlp_ratio: float, layer_scale: float):
        super().__init__()
        dim = attention.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attention, MLP(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, grid: Grid, keyframes: Tensor | None = None) -> Tensor:
        return self._rest(x, self.attn(self.norm1(x), grid, keyframes=keyframes))

    def stream(self, x: Tensor, grid: Grid, state: Descriptors | None, drop_rate: int) -> tuple[Tensor, Descriptors]:
        mixed, state = self.attn.stream(self.norm1(x), grid, state, drop_rate=drop_rate)
        return self._rest(x, mixed), state

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.ls1(mixed)
        return x + self.ls2(self.mlp(self.norm2(x)))


class FlashVGGTAggregator(nn.Module, PyTorchModelHubMixin):
    """Frames (B, S, 3, H, W) with values in [0, 1] to tokens of chosen layers, each (B, S, P, 2 dim).

    Patches are embedded by a convolution; each frame gets a camera token and registers in front, of which the first
    frame has its own. Then ``depth`` pairs of a block inside frames and a block between frames; an output is what both
    of a pair gave. ``kv_downfactor=1`` is VGGT. The published network embeds patches with DINOv2: assign any module
    (B·S, 3, H, W) to (B·S, h·w, dim) to ``patch_embed``.

    Args:
        dim, depth, num_heads: sizes.
        patch_size: of the square patches, dividing H and W.
        num_registers: besides the camera token.
        kv_downfactor, compressor, qk_norm, rope_freq: of the blocks between frames, see `DescriptorAttention`.
        keyframe_every: see `select_keyframes`.
        layers: pairs whose output is returned; the last is always.
        mlp_ratio: of the MLPs.
        layer_scale: initial factor of the branches.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        patch_size: int = 14,
        num_registers: int = 4,
        kv_downfactor: int = 4,
        compressor: Compressor = "bilinear",
        qk_norm: bool = True,
        rope_freq: float | None = 100.0,
        keyframe_every: int = 10,
        layers: Sequence[int] = (4, 11, 17, 23),
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.01,
    ):
        super().__init__()
        if depth < 1:
            raise ArgumentError(f"depth: expected at least 1, got {depth}")
        self.patch_size, self.keyframe_every = patch_size, keyframe_every
        self.layers = {layer for layer in layers if layer < depth} | {depth - 1}
        self.patch_embed: nn.Module = PatchEmbed(dim, patch_size)
        self.camera_token = nn.Parameter(torch.randn(2, 1, dim) * 1e-6)  # of the first frame, of the others
        self.register_token = nn.Parameter(torch.randn(2, num_registers, dim) * 1e-6)

        def blocks(factor: int) -> nn.ModuleList:
            attentions = (
                DescriptorAttention(dim, num_heads, factor, qk_norm, rope_freq, compressor) for _ in range(depth)
            )
            return nn.ModuleList(FrameBlock(attention, mlp_ratio, layer_scale) for attention in attentions)

        self.frame_blocks, self.global_blocks = blocks(1), blocks(kv_downfactor)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, keyframes: Tensor | None = None) -> list[Tensor]:
        """All frames at once; ``keyframes`` (B, F) are chosen by `select_keyframes` unless given."""
        x, grid = self._embed(images, first=True)
        keyframes = select_keyframes(x, self.keyframe_every) if keyframes is None else keyframes
        return self._run(x, grid, lambda block, x, layer: block(x, grid, keyframes))

    def stream(
        self, images: Tensor, state: tuple[Descriptors, ...] | None = None, *, drop_rate: int = 1
    ) -> tuple[list[Tensor], tuple[Descriptors, ...]]:
        """The outputs for the next frames, and the descriptors of all layers that the frames after them read.

        The first frame is the only key frame. Of each chunk every ``drop_rate``-th frame is remembered.
        """
        x, grid = self._embed(images, first=state is None)
        states: list[Descriptors] = []

        def step(block: FrameBlock, x: Tensor, layer: int) -> Tensor:
            x, after = block.stream(x, grid, None if state is None else state[layer], drop_rate)
            states.append(after)
            return x

        return self._run(x, grid, step), tuple(states)

    def _run(self, x: Tensor, grid: Grid, between: Any) -> list[Tensor]:
        outputs = []
        for layer, (inside, outside) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            framed = inside(x.flatten(0, 1).unsqueeze(1), grid).view(x.shape)
            x = between(outside, framed, layer)
            if layer in self.layers:
                outputs.append(torch.cat([framed, x], -1))
        return outputs

    def _embed(self, images: Tensor, first: bool) -> tuple[Tensor, Grid]:
        """Tokens (B, S, P, C) and the grid of the patches; ``first``: the sequence starts with these frames."""
        p = self.patch_size
        if images.dim() != 5 or images.shape[2] != 3 or images.shape[3] % p or images.shape[4] % p:
            raise ShapeError(f"images: expected (B, S, 3, {p}m, {p}n), got {tuple(images.shape)}")
        batch, frames = images.shape[:2]
        patches = self.patch_embed(((images - self.mean) / self.std).flatten(0, 1)).unflatten(0, (batch, frames))
        kind = torch.ones(frames, dtype=torch.long, device=images.device)
        kind[0] = 0 if first else 1
        special = torch.cat([self.camera_token, self.register_token], 1)[kind].expand(batch, -1, -1, -1)
        return torch.cat([special, patches], 2), (images.shape[3] // p, images.shape[4] // p)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        patch_embed: str = "dinov2_vitl14_reg",
        qk_norm: bool = True,
        rope_freq: float = 100,
        init_values: float = 0.01,
        intermediate_layer_idx: Sequence[int] = (4, 11, 17, 23),
        kv_downfactor: int = 1,
        keyframe_every: int = 10,
        compressor_type: Compressor = "bilinear",
    ) -> "FlashVGGTAggregator":
        """The published ``Aggregator``, VGGT's too, with ``patch_embed="conv"``."""
        if "conv" not in patch_embed:
            raise Unsupported(f"patch_embed: only 'conv' can be loaded, got {patch_embed!r}")
        rope = rope_freq if rope_freq > 0 else None
        model = cls(
            embed_dim,
            depth,
            num_heads,
            patch_size,
            num_register_tokens,
            kv_downfactor,
            compressor_type,
            qk_norm,
            rope,
            keyframe_every,
            intermediate_layer_idx,
            mlp_ratio,
            init_values,
        )
        state, names = dict(state_dict), {}
        for name in ("camera_token", "register_token"):
            state[name] = state[name].squeeze(0)
        for block in (f"{kind}_blocks.{layer}" for kind in ("frame", "global") for layer in range(depth)):
            state = own_names(state, num_heads, rope is not None, f"{block}.attn.")
            names[f"{block}.attn.proj"] = f"{block}.attn.o_proj"
        load_strictly(model, state, names)
        return model


class PatchEmbed(nn.Module):
    """(B, 3, H, W) to (B, h·w, dim)."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = Conv2d(3, dim, patch_size, patch_size, padding=0)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.movedim(1, -1)).flatten(1, 2)
