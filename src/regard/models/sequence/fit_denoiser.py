"""FITDenoiser, the interleaved transformer of a diffusion model (arXiv:2305.12689)."""

from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.models.sequence.fit import chunk_of
from regard.models.sequence.fit_keras import own_arguments, own_weights
from regard.models.sequence.fit_layers import (
    EPS,
    Interleaved,
    Positions,
    PositionTable,
    ResidualMLP,
    group_size,
    sin_cos_code,
)


class TimeEmbedding(nn.Module):
    """``W1 [SiLU(W0 code(1000 t)), features]``, the code standardised: (B,), or (B, 1 + features), to (B, dim)."""

    def __init__(self, dim: int, num_features: int = 0):
        super().__init__()
        if dim % 4:
            raise ArgumentError(f"latent_dim: the time embedding needs a multiple of 4, got {dim}")
        self.fc0, self.fc1 = nn.Linear(dim // 4, dim), nn.Linear(dim + num_features, dim)

    def forward(self, time: Tensor) -> Tensor:
        time, features = (time, time.new_empty(len(time), 0)) if time.dim() == 1 else (time[:, 0], time[:, 1:])
        code = sin_cos_code(time * 1000.0, self.fc0.in_features)
        code = (code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)
        return self.fc1(torch.cat([F.silu(self.fc0(code.to(self.fc0.weight.dtype))), features], -1))


class FITDenoiser(nn.Module, PyTorchModelHubMixin):
    """Noisy tokens in groups (B, t, n, in_dim), time and condition to (B, t, n, out_dim) and the latents.

        latents = table + LN(MLP(latents before))          with self_cond="latent"; LN begins with a gain of 0
        in each global stage latents also read the tokens [time, W cond]

    Args:
        layers: as for `FIT`.
        num_tokens, num_groups, latents_per_group: as for `FIT`.
        dim, latent_dim, num_heads, latent_num_heads, mlp_ratio: as for `FIT`.
        in_dim, mask, positions, latent_positions, dropout, attention_dropout, drop_path: as for `FIT`.
        out_dim: of the output.
        cond_dim: of the condition; None if it comes with ``latent_dim`` channels and is not projected.
        num_features: what stands beside the time, in the same argument.
        self_cond: "latent" to start from the latents of the denoising step before, or "none".
        local_attention: whether groups attend locally.
        cross_mlp: an MLP after each layer between tokens and latents.
        context_norm: norm what those layers and the ones that read the condition read.
    """

    def __init__(
        self,
        layers: str,
        num_tokens: int,
        num_groups: int,
        latents_per_group: int,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_num_heads: int,
        in_dim: int,
        out_dim: int,
        cond_dim: int | None = None,
        num_features: int = 0,
        mlp_ratio: int = 4,
        self_cond: Literal["none", "latent"] = "none",
        local_attention: bool = True,
        cross_mlp: bool = False,
        context_norm: bool = True,
        mask: Literal["none", "causal"] = "none",
        positions: Positions = "learned",
        latent_positions: Positions = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if self_cond not in ("none", "latent"):
            raise ArgumentError(f"self_cond: expected none or latent, got {self_cond!r}")
        n = group_size(num_tokens, num_groups, latents_per_group)
        self.x_shape, self.latents_shape = (num_groups, n, in_dim), (num_groups, latents_per_group, latent_dim)
        self.stem, self.stem_norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim, eps=EPS)
        self.time = TimeEmbedding(latent_dim, num_features)
        self.cond_proj = nn.Identity() if cond_dim is None else nn.Linear(cond_dim, latent_dim)
        self.positions = PositionTable(positions, n, 1, dim)
        self.latents = PositionTable(latent_positions, num_groups, latents_per_group, latent_dim, "latent_positions")
        self.previous = ResidualMLP(latent_dim, mlp_ratio) if self_cond == "latent" else None
        self.previous_norm = nn.LayerNorm(latent_dim, eps=EPS) if self_cond == "latent" else None
        if self.previous_norm is not None:
            nn.init.zeros_(self.previous_norm.weight)
        self.trunk = Interleaved(
            layers,
            dim,
            latent_dim,
            num_heads,
            latent_num_heads,
            mlp_ratio,
            chunk=chunk_of(mask, latents_per_group),
            conditioned=True,
            local_attention=local_attention,
            cross_mlp=cross_mlp,
            context_norm=context_norm,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self.norm, self.head = nn.LayerNorm(dim, eps=EPS), nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``time`` (B,) from 0 to 1, ``cond`` (B, cond_dim) or (B, s, cond_dim), ``previous`` latents or zeros."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.x_shape:
            raise ShapeError(f"x: expected (B, {', '.join(map(str, self.x_shape))}), got {tuple(x.shape)}")
        if previous is not None and tuple(previous.shape) != (len(x), *self.latents_shape):
            raise ShapeError(f"previous: expected {(len(x), *self.latents_shape)}, got {tuple(previous.shape)}")
        latents = self.latents().unflatten(0, self.latents_shape[:2]).expand(len(x), -1, -1, -1)
        if self.previous is not None and self.previous_norm is not None:
            before = latents.new_zeros(latents.shape) if previous is None else previous
            latents = latents + self.previous_norm(self.previous(before))
        cond = self.cond_proj(cond)
        cond = torch.cat([self.time(time)[:, None], cond[:, None] if cond.dim() == 2 else cond], 1)
        x = self.stem_norm(self.stem(x)) + self.positions()
        x, latents = self.trunk(x, latents, cond)
        return self.head(self.norm(x)), latents

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "FITDenoiser":
        """The Keras layer's variables, by their paths below its name."""
        weights = own_weights(state_dict)
        cond, after_time = weights.get("cond_proj.weight"), weights["time.fc1.weight"]
        model = cls(
            **own_arguments({name: value for name, value in official_kwargs.items() if name != "cond_proj"}),
            in_dim=weights["stem.weight"].shape[1],
            cond_dim=None if cond is None else cond.shape[1],
            num_features=after_time.shape[1] - after_time.shape[0],
        )
        load_strictly(model, weights)
        return model.eval()
