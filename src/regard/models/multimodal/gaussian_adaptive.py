"""A classifier on the layers of a frozen encoder, reweighted by Gaussian adaptive attention."""

from collections.abc import Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.layers import MLP
from regard.mechanisms.gates.gaussian import GaussianBlock


class GaussianAdaptiveTransformer(nn.Module, PyTorchModelHubMixin):
    """Outputs of an encoder's layers (B, L, N, C) to logits (B, num_classes) (arXiv:2401.11143).

        features → GaussianBlock along layers and channels → mean over layers and tokens → norm, MLP, linear

    How the paper wires its classifier was not published; this is a reconstruction.

    Args:
        num_classes: how many.
        dim: C.
        axes: of the block's layers: 1 for the encoder's layers, 2 for tokens, 3 for channels.
        num_heads: of each of them.
        num_gaussians: of each of them.
        hidden_dim: of the MLP, C by default.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        axes: Sequence[int] = (1, 3),
        num_heads: int | Sequence[int] = (1, 4),
        num_gaussians: int | Sequence[int] = 3,
        hidden_dim: int | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.block = GaussianBlock(axes, num_heads, num_gaussians)
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dim if hidden_dim is None else hidden_dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits; ``valid`` (B, N) bool, False marks tokens that are padding."""
        if features.dim() != 4 or features.shape[-1] != self.dim:
            raise ShapeError(f"features: expected (B, L, N, {self.dim}), got {tuple(features.shape)}")
        tokens = (features.shape[0], features.shape[2])
        if valid is None:
            valid = features.new_ones(tokens, dtype=torch.bool)
        elif valid.dtype != torch.bool or tuple(valid.shape) != tokens:
            raise ShapeError(f"valid: expected bool {tokens}, got {valid.dtype} {tuple(valid.shape)}")
        real = valid[:, None, :, None]
        x = self.block(features.masked_fill(~real, 0.0), real)
        pooled = (x * real).sum((1, 2)) / (valid.sum(1, keepdim=True) * features.shape[1]).clamp(min=1)
        return self.head(self.mlp(self.norm(pooled)))
