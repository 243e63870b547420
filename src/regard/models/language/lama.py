"""A text classifier that reads with a recurrent network and pools with LAMA."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard.errors import ShapeError
from regard.mechanisms.pooled.lama import LowRankPooling


class LAMAClassifier(nn.Module, PyTorchModelHubMixin):
    """Embedding, bidirectional GRU, low-rank pooling, MLP (arXiv:1912.00835); ids (B, N) to logits (B, num_classes).

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        num_classes: how many.
        embed_dim: width of the embedding.
        hidden_dim: of each direction of the GRU, and of the MLP.
        num_heads: of the pooling.
        context: of the pooling, "mean" or "learned".
        dropout: before the GRU and in the MLP.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        embed_dim: int = 300,
        hidden_dim: int = 128,
        num_heads: int = 8,
        context: str = "mean",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(embed_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.pooling = LowRankPooling(2 * hidden_dim, num_heads, context)  # type: ignore[arg-type]
        self.classifier = nn.Sequential(
            nn.Linear(2 * hidden_dim * num_heads, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, num_classes),
        )

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            ids: (B, N) integers.
            valid: (B, N) bool, False marks padding, which follows the text.
        """
        if ids.dim() != 2 or ids.is_floating_point():
            raise ShapeError(f"ids: expected integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        x = self.dropout(self.embedding(ids))
        if valid is None:
            states, _ = self.gru(x)
        else:
            if valid.dtype != torch.bool or valid.shape != ids.shape:
                raise ShapeError(f"valid: expected bool {tuple(ids.shape)}, got {valid.dtype} {tuple(valid.shape)}")
            if bool((~valid[:, :-1] & valid[:, 1:]).any()):
                raise ShapeError("valid: expected padding behind the text only")
            lengths = valid.sum(1).clamp(min=1).cpu()
            packed, _ = self.gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            states, _ = pad_packed_sequence(packed, batch_first=True, total_length=ids.shape[1])
        return self.classifier(self.pooling(states, valid).flatten(1))
