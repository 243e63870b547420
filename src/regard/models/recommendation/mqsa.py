"""MQSA-TED, a recommender of next items (arXiv:2311.01056)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, load_strictly
from regard.mechanisms.base import check_rate
from regard.mechanisms.heads.window_query import WindowQueryAttention

EPS = 1e-24
#: subtracted from the scores of items seen
SEEN = 2.0**32


class WindowQueryBlock(nn.Module):
    """``o = LN(attention(h))``, then ``o + mlp(o)``; zeros at padding. (B, T, C) to (B, T, C)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, dropout: float):
        super().__init__()
        self.attn = WindowQueryAttention(dim, num_heads, window_size, dropout=dropout, eps=EPS)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, dim, act=nn.ReLU)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, valid: Tensor) -> Tensor:
        o = self.norm(self.attn(h, valid=valid))
        o = o + self.dropout(self.mlp.fc2(self.dropout(self.mlp.act(self.mlp.fc1(o)))))
        return o.masked_fill(~valid[..., None], 0.0)


class MQSA(nn.Module, PyTorchModelHubMixin):
    """Multi-query self-attention for next items: the mean of a branch with short and one with long query windows.

        h = E[seq] √C + positions
        logits = α LN(short(h)) Eᵀ + (1 - α) LN(long(h)) Eᵀ

    (B, T) item ids, padded on the left with the id ``num_items``, to logits (B, T, num_items + 1), whose last column,
    of the padding, is 0. Positions count from the right, so a shorter T gives what padding to ``max_length`` would.
    "Multi-query" means two windows of queries, not shared heads of keys.

    Args:
        num_items: how many items, 0 to ``num_items - 1``.
        dim: C.
        max_length: the largest T.
        window_size: of the long branch's queries; the short one's is 1.
        alpha: weight of the short branch.
        num_layers: blocks of each branch.
        num_heads: H.
        dropout: of embeddings, attention weights, the MLP and in `transition_distillation_loss`.
    """

    def __init__(
        self,
        num_items: int,
        dim: int = 64,
        max_length: int = 50,
        window_size: int = 3,
        alpha: float = 0.5,
        num_layers: int = 1,
        num_heads: int = 1,
        dropout: float = 0.5,
    ):
        super().__init__()
        for name, value in (("num_items", num_items), ("max_length", max_length), ("num_layers", num_layers)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        self.num_items, self.dim, self.max_length = num_items, dim, max_length
        self.alpha = check_rate("alpha", alpha)
        self.item_embedding = nn.Parameter(torch.randn(num_items, dim) * 0.01)
        self.position_embedding = nn.Parameter(torch.randn(max_length, dim) * 0.01)
        self.dropout = nn.Dropout(check_rate("dropout", dropout))
        self.short, self.long = (
            nn.ModuleList(WindowQueryBlock(dim, num_heads, window, dropout) for _ in range(num_layers))
            for window in (1, window_size)
        )
        self.short_norm, self.long_norm = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))

    def forward(self, seq: Tensor) -> Tensor:
        if seq.dim() != 2 or not 1 <= seq.shape[1] <= self.max_length:
            raise ShapeError(f"seq: expected (B, T) with T from 1 to {self.max_length}, got {tuple(seq.shape)}")
        items = F.pad(self.item_embedding, (0, 0, 0, 1))
        valid = seq != self.num_items
        h = F.embedding(seq, items) * self.dim**0.5 + self.position_embedding[-seq.shape[1] :]
        h = self.dropout(h).masked_fill(~valid[..., None], 0.0)
        short, long = h, h
        for short_block, long_block in zip(self.short, self.long, strict=True):
            short, long = short_block(short, valid), long_block(long, valid)
        short, long = self.short_norm(short) @ items.mT, self.long_norm(long) @ items.mT
        return self.alpha * short + (1 - self.alpha) * long

    def score(self, seq: Tensor, seen: Tensor | None = None) -> Tensor:
        """Of each item as the next one, (B, num_items); 2³² less for those marked in ``seen`` (B, num_items)."""
        scores = self(seq)[:, -1, :-1]
        if seen is None:
            return scores
        if seen.shape != scores.shape:
            raise ShapeError(f"seen: expected {tuple(scores.shape)}, got {tuple(seen.shape)}")
        return scores - SEEN * seen.to(scores.dtype)

    @torch.no_grad()
    def recommend(self, seq: Tensor, k: int, seen: Tensor | None = None) -> Tensor:
        """The ``k`` best next items (B, k), the best first; those ``seen`` come after all others."""
        if not 1 <= k <= self.num_items:
            raise ArgumentError(f"k: expected 1 to {self.num_items} items, got {k}")
        return self.score(seq, seen).topk(k).indices

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "MQSA":
        """The variables of the TensorFlow class by name; arguments of its training are not needed."""
        num_layers = official_kwargs.get("num_block", 1)
        model = cls(
            num_items=official_kwargs["num_item"],
            dim=official_kwargs.get("num_factor", 64),
            max_length=official_kwargs.get("max_len", 50),
            window_size=official_kwargs.get("L", 3),
            alpha=official_kwargs.get("alpha", 0.5),
            num_layers=num_layers,
            num_heads=official_kwargs.get("num_head", 1),
            dropout=official_kwargs.get("dropout_rate", 0.5),
        )
        names = _official_names(num_layers)
        load_strictly(
            model,
            {names.get(name, name): t.mT if name.endswith("/kernel") else t for name, t in state_dict.items()},
        )
        return model.eval()


def _official_names(num_layers: int) -> dict[str, str]:
    """TensorFlow numbers variables in the order in which they were made."""
    names = {
        "item_embedding/item_embedding": "item_embedding",
        "positional_embedding/position_embedding": "position_embedding",
    }
    dense = 0
    for branch in ("short", "long"):
        norms = [f"{branch}.{i}.{norm}" for i in range(num_layers) for norm in ("attn.norm", "norm")]
        norms.append(f"{branch}_norm")
        variables = [f"{norm}.{kind}" for norm in norms for kind in ("bias", "weight")]
        names |= {f"block_{branch}_query/Variable{_suffix(i)}": name for i, name in enumerate(variables)}
        for i in range(num_layers):
            for layer in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1", "mlp.fc2"):
                for official, own in (("kernel", "weight"), ("bias", "bias")):
                    names[f"dense{_suffix(dense)}/{official}"] = f"{branch}.{i}.{layer}.{own}"
                dense += 1
    return names


def _suffix(i: int) -> str:
    return f"_{i}" if i else ""


def transition_counts(sequences: Iterable[Sequence[int]], num_items: int, span: int = 1) -> Tensor:
    """How often item i was followed by j within ``span`` steps: a sparse (num_items, num_items) tensor of floats."""
    if span < 1:
        raise ArgumentError(f"span: expected at least 1, got {span}")
    pairs = [pair for items in sequences for step in range(1, span + 1) for pair in zip(items, items[step:])]  # noqa: B905
    index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    if index.numel() and (index.min() < 0 or index.max() >= num_items):
        raise ArgumentError(f"sequences: expected items from 0 to {num_items - 1}, got {index.min()} to {index.max()}")
    ones = torch.ones(index.shape[1])
    return torch.sparse_coo_tensor(index, ones, (num_items, num_items), check_invariants=False).coalesce()


def transition_distillation_loss(
    embedding: Tensor, items: Tensor, counts: Tensor, tau: float = 0.1, dropout: float = 0.0
) -> Tensor:
    """How far similarities of items are from the transitions that were counted.

        teacher = softmax((C_i / max C_i) / τ)       student = softmax(√C E_i Eᵀ / τ)
        loss = mean over i of -Σ_j teacher_j log student_j

    Args:
        embedding: E (I, C).
        items: i (n,), without padding; an item that stands there twice counts twice.
        counts: their rows (n, I) of `transition_counts`; a sparse table's are ``table.index_select(0, items)``. A row
            of zeros is a uniform teacher.
        tau: τ.
        dropout: of E_i.
    """
    if items.dim() != 1 or tuple(counts.shape) != (len(items), len(embedding)):
        raise ShapeError(
            f"counts: expected a row of {len(embedding)} for each item of items (n,), got {tuple(counts.shape)} "
            f"and {tuple(items.shape)}"
        )
    if tau <= 0:
        raise ArgumentError(f"tau: expected more than 0, got {tau}")
    counts = (counts.to_dense() if counts.is_sparse else counts).to(embedding.dtype)
    teacher = (counts / (counts.amax(1, keepdim=True) + EPS) / tau).softmax(1)
    heads = F.dropout(F.embedding(items, embedding) * embedding.shape[1] ** 0.5, dropout)
    student = (heads @ embedding.mT / tau).softmax(1)
    return -(teacher * (student + EPS).log()).sum(1).mean()


class Losses(NamedTuple):
    """``total = recommendation + weight · distillation + l2 Σ ‖parameter‖² / 2``."""

    total: Tensor
    recommendation: Tensor
    distillation: Tensor


def ted_losses(
    model: MQSA,
    seq: Tensor,
    targets: Tensor,
    items: Tensor,
    counts: Tensor,
    weight: float = 0.1,
    tau: float = 0.1,
    l2: float = 1e-4,
) -> Losses:
    """The training losses of MQSA-TED.

    Args:
        model: in train mode it drops out.
        seq: (B, T).
        targets: (B, T), the next items, ``num_items`` where there is none.
        items: (n,), usually all real items of ``seq``.
        counts: (n, num_items), see `transition_distillation_loss`.
        weight, tau, l2: of the distillation, and of the squares of all parameters.
    """
    logits = model(seq)
    recommendation = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=model.num_items)
    dropout = model.dropout.p if model.training else 0.0
    distillation = transition_distillation_loss(model.item_embedding, items, counts, tau, dropout)
    squares = torch.stack([p.square().sum() for p in model.parameters()]).sum() / 2
    return Losses(recommendation + weight * distillation + l2 * squares, recommendation, distillation)
