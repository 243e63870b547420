"""FIT, the encoder of far-reaching interleaved transformers (arXiv:2305.12689)."""

from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.models.sequence.fit_keras import own_arguments, own_weights
from regard.models.sequence.fit_layers import EPS, Interleaved, Positions, PositionTable, group_size


class FIT(nn.Module, PyTorchModelHubMixin):
    """Encodes L tokens in t groups of n: local attention in groups, global attention among m latents of each.

        x = LN(W x) + positions          the same positions in every group
        x, latents = Interleaved(x, latents)
        → LN(x) (B, t, n, dim), LN(latents) (B, t, m, latent_dim)

    Further tokens y (B, t, p, y_dim) may stand before those of x in each group, without positions; they come out too.

    Args:
        layers: such as "(2)4(2)", see `Interleaved`.
        num_tokens: L.
        num_groups: t, dividing L.
        latents_per_group: m.
        dim: width of tokens.
        latent_dim: width of latents.
        num_heads: of local attention.
        latent_num_heads: of global attention.
        in_dim: of x.
        mlp_ratio: hidden width by width.
        y_dim: of the tokens y; None if there are none.
        mask: "causal" lets latents see no later groups (tokens of a group still see each other).
        positions, latent_positions: "learned" or "sin_cos"; for tokens also "sin_cos2d", groups being squares.
        dropout, attention_dropout, drop_path: of the local and global layers.
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
        mlp_ratio: int = 4,
        y_dim: int | None = None,
        mask: Literal["none", "causal"] = "none",
        positions: Positions = "learned",
        latent_positions: Positions = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        n = group_size(num_tokens, num_groups, latents_per_group)
        self.x_shape = (num_groups, n, in_dim)
        self.y_dim = y_dim
        self.stem, self.stem_norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim, eps=EPS)
        self.stem_y = None if y_dim is None else nn.Linear(y_dim, dim)
        self.stem_y_norm = None if y_dim is None else nn.LayerNorm(dim, eps=EPS)
        self.positions = PositionTable(positions, n, 1, dim)
        self.latents = PositionTable(latent_positions, num_groups, latents_per_group, latent_dim, "latent_positions")
        self.trunk = Interleaved(
            layers,
            dim,
            latent_dim,
            num_heads,
            latent_num_heads,
            mlp_ratio,
            chunk=chunk_of(mask, latents_per_group),
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self.norm, self.latent_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(latent_dim, eps=EPS)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.x_shape:
            raise ShapeError(f"x: expected (B, {', '.join(map(str, self.x_shape))}), got {tuple(x.shape)}")
        groups = self.x_shape[0]
        x = self.stem_norm(self.stem(x)) + self.positions()
        if y is not None:
            if self.stem_y is None or self.stem_y_norm is None:
                raise ArgumentError("y: built without y_dim, expected None")
            if y.dim() != 4 or tuple(y.shape[:2]) != (x.shape[0], groups) or y.shape[-1] != self.y_dim:
                raise ShapeError(f"y: expected ({x.shape[0]}, {groups}, p, {self.y_dim}), got {tuple(y.shape)}")
            x = torch.cat([self.stem_y_norm(self.stem_y(y)), x], 2)
        latents = self.latents().unflatten(0, (groups, -1)).expand(x.shape[0], -1, -1, -1)
        x, latents = self.trunk(x, latents)
        return self.norm(x), self.latent_norm(latents)

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "FIT":
        """The Keras layer's variables, by their paths below its name."""
        weights = own_weights(state_dict)
        y = weights.get("stem_y.weight")
        model = cls(
            **own_arguments(official_kwargs),
            in_dim=weights["stem.weight"].shape[1],
            y_dim=None if y is None else y.shape[1],
        )
        load_strictly(model, weights)
        return model.eval()


def chunk_of(mask: str, latents_per_group: int) -> int | None:
    """The latents of a group if later groups are hidden from them."""
    if mask not in ("none", "causal"):
        raise ArgumentError(f"mask: expected none or causal, got {mask!r}")
    return latents_per_group if mask == "causal" else None
