"""FITAR, the autoregressive interleaved transformer (arXiv:2305.12689)."""

from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ShapeError
from regard.layers import load_strictly
from regard.models.sequence.fit_keras import own_arguments, own_weights
from regard.models.sequence.fit_layers import EPS, Interleaved, Positions, PositionTable, group_size


class FITAR(nn.Module, PyTorchModelHubMixin):
    """Token ids in groups (B, t, n) to logits (B, t, n, vocab_size), each from the tokens up to its own place.

    Local attention is causal in the group, latents see their group and those before, and a group's tokens read the
    latents of the group before (zeros in the first one). To predict, the caller shifts the ids by one token.

    Args:
        layers: as for `FIT`.
        num_tokens, num_groups, latents_per_group: as for `FIT`.
        dim, latent_dim, num_heads, latent_num_heads, mlp_ratio: as for `FIT`.
        positions, latent_positions, dropout, attention_dropout, drop_path: as for `FIT`.
        vocab_size: number of ids.
        shared_embedding: the output uses the input's embedding.
        output_bias: a bias for each id.
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
        vocab_size: int,
        mlp_ratio: int = 4,
        shared_embedding: bool = True,
        output_bias: bool = True,
        positions: Positions = "learned",
        latent_positions: Positions = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.shape = (num_groups, group_size(num_tokens, num_groups, latents_per_group))

        def normal(*size: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(size), std=0.02))

        self.embedding = normal(vocab_size, dim)
        self.out_embedding = None if shared_embedding else normal(vocab_size, dim)
        self.out_bias = normal(vocab_size) if output_bias else None
        self.positions = PositionTable(positions, self.shape[1], 1, dim)
        self.latents = PositionTable(latent_positions, num_groups, latents_per_group, latent_dim, "latent_positions")
        self.trunk = Interleaved(
            layers,
            dim,
            latent_dim,
            num_heads,
            latent_num_heads,
            mlp_ratio,
            causal_local=True,
            chunk=latents_per_group,
            shift=True,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 3 or tuple(ids.shape[1:]) != self.shape:
            raise ShapeError(f"ids: expected (B, {self.shape[0]}, {self.shape[1]}), got {tuple(ids.shape)}")
        x = F.embedding(ids, self.embedding) + self.positions()
        latents = self.latents().unflatten(0, (self.shape[0], -1)).expand(len(ids), -1, -1, -1)
        x, _ = self.trunk(x, latents)
        return F.linear(
            self.norm(x), self.embedding if self.out_embedding is None else self.out_embedding, self.out_bias
        )

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "FITAR":
        """The Keras layer's variables, by their paths below its name."""
        model = cls(**own_arguments(official_kwargs))
        load_strictly(model, own_weights(state_dict))
        return model.eval()
