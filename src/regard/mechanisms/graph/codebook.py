"""Attention of a few nodes to all nodes of a huge graph, for which the vectors of a codebook stand."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.mechanisms.base import check_rate


def codebook_attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D + ln counts) v: attention to M vectors, of which number c stands for ``counts[c]`` equal ones.

    Args:
        q: (B, H, N, D).
        k, v: (B, H, M, D) and (B, H, M, Dv).
        counts: (M,), not negative; vectors that stand for nothing are not seen.
        dropout: share of the weights that is dropped.
    """
    bias, mask = counts.clamp(min=1).to(q.dtype).log()[None, None, None], (counts > 0)[None, None, None]
    if dropout == 0.0:
        return attention(q, k, v, mask=mask, bias=bias)
    each = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    return F.dropout(attention(q, k, each, mask=mask, bias=bias), dropout) @ v


class EMACodebook(nn.Module):
    """M vectors that follow the vectors they are nearest to, by exponential moving averages.

    One update with x (n, dim), normalised to x̂ in each channel by its batch (in eval mode by running statistics):

        a_i = argmin_c |x̂_i - w_c|²
        N_c ← d N_c + (1 - d) |{i : a_i = c}|,   then N_c ← (N_c + ε) / (ΣN + M ε) ΣN
        s_c ← d s_c + (1 - d) Σ_{i : a_i = c} x̂_i                     w_c = s_c / N_c

    Args:
        dim, num_centroids: of the vectors, and M.
        decay: d.

    Attributes:
        embedding: (M, dim), w.
        centroids: (M, dim), w with the normalisation undone.
        cluster_size, embedding_sum: N (M,) and s (M, dim).
    """

    embedding: Tensor
    centroids: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor
    eps = 1e-5

    def __init__(self, dim: int, num_centroids: int, decay: float = 0.99):
        super().__init__()
        if num_centroids < 1:
            raise ArgumentError(f"num_centroids: expected at least 1, got {num_centroids}")
        self.decay = check_rate("decay", decay)
        for name in ("embedding", "centroids", "embedding_sum"):
            self.register_buffer(name, torch.randn(num_centroids, dim))
        self.register_buffer("cluster_size", torch.zeros(num_centroids))
        self.bn = nn.BatchNorm1d(dim, eps=self.eps, affine=False)

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """Assign x (n, dim) to its nearest vectors (n,), and in training mode, with n ≥ 2, let those follow."""
        dim = self.embedding.shape[1]
        if x.dim() != 2 or x.shape[1] != dim or (self.training and x.shape[0] < 2):
            least = ", with n of 2 or more" if self.training else ""
            raise ShapeError(f"x: expected (n, {dim}){least}; got {tuple(x.shape)}")
        x = self.bn(x)
        nearest = (x.square().sum(1, True) + self.embedding.square().sum(1) - 2 * x @ self.embedding.mT).argmin(1)
        if self.training:
            counts = torch.bincount(nearest, minlength=len(self.embedding))
            size = self.decay * self.cluster_size + (1 - self.decay) * counts
            total = size.sum()
            size = (size + self.eps) / (total + len(size) * self.eps) * total
            sums = torch.zeros_like(self.embedding_sum).index_add(0, nearest, x.to(self.embedding_sum.dtype))
            self.cluster_size.copy_(size)
            self.embedding_sum.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            self.embedding.copy_(self.embedding_sum / size.unsqueeze(1))
            mean, var = self.bn.running_mean, self.bn.running_var
            assert mean is not None
            assert var is not None
            self.centroids.copy_(self.embedding * (var + self.eps).sqrt() + mean)
        return nearest


class CodebookAttention(nn.Module):
    """LargeGT's global attention (arXiv:2312.11109): to a codebook instead of all nodes, whatever their number.

        q = Wq [Wg x, p]     k = Wk c     v = Wv c[: global_dim]
        y_h = softmax_c(q k_cᵀ / √D + ln n_c) v_c           c over the M vectors, n_c nodes assigned to each

    x (B, dim) and positions p (B, global_dim) of B nodes to (B, H·D). Equals attention to all nodes where every node
    equals its vector; cost O(B M H D), and O(num_nodes) to count. In training mode the codebook follows [Wg x, p] after
    it has been attended to, and the nodes of the batch are assigned anew. Gradients are those of the codebook that was
    attended to; the released code swaps it beneath autograd, so its gradient of Wk is of the updated one.

    Args:
        dim: of x.
        num_heads, head_dim: H and D.
        global_dim: of the positions, and half of the codebook's.
        num_nodes: of the graph.
        num_centroids: M.
        decay: of the codebook's averages.
        dropout: of the attention weights in training.
    """

    assignment: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        global_dim: int,
        num_nodes: int,
        num_centroids: int,
        decay: float = 0.99,
        dropout: float = 0.0,
    ):
        super().__init__()
        per_head(dim, num_heads, head_dim)
        if num_nodes < 1:
            raise ArgumentError(f"num_nodes: expected at least 1, got {num_nodes}")
        self.dim, self.num_heads, self.global_dim, self.num_nodes = dim, num_heads, global_dim, num_nodes
        self.dropout = check_rate("dropout", dropout)
        self.codebook = EMACodebook(2 * global_dim, num_centroids, decay)
        small = torch.int16 if num_centroids <= torch.iinfo(torch.int16).max else torch.int32
        self.register_buffer("assignment", torch.randint(num_centroids, (num_nodes,), dtype=small))
        self.g_proj = nn.Linear(dim, global_dim)
        self.q_proj, self.k_proj = (nn.Linear(2 * global_dim, num_heads * head_dim) for _ in range(2))
        self.v_proj = nn.Linear(global_dim, num_heads * head_dim)

    def counts(self) -> Tensor:
        """(M,), how many nodes each vector stands for."""
        return torch.bincount(self.assignment.int(), minlength=len(self.codebook.centroids))

    def forward(self, x: Tensor, pos_enc: Tensor, batch_idx: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, dim).
            pos_enc: (B, global_dim).
            batch_idx: (B,) which nodes these are; needed in training mode.
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"x: expected (B, {self.dim}), got {tuple(x.shape)}")
        if pos_enc.shape != (x.shape[0], self.global_dim):
            raise ShapeError(f"pos_enc: expected {(x.shape[0], self.global_dim)}, got {tuple(pos_enc.shape)}")
        if batch_idx is not None and batch_idx.shape != x.shape[:1]:
            raise ShapeError(f"batch_idx: expected ({x.shape[0]},), got {tuple(batch_idx.shape)}")
        if self.training and batch_idx is None:
            raise ArgumentError("batch_idx: expected the nodes' numbers in training mode, got None")
        asking = torch.cat([self.g_proj(x), pos_enc], 1)
        centroids = self.codebook.centroids.clone()  # the update below is in place, before the backward reads them
        values = self.v_proj(centroids[:, : self.global_dim])
        q, k, v = (split_heads(t[None], self.num_heads) for t in (self.q_proj(asking), self.k_proj(centroids), values))
        y = merge_heads(codebook_attention(q, k, v, self.counts(), self.dropout if self.training else 0.0))[0]
        if self.training:
            self.assignment[batch_idx] = self.codebook.update(asking).to(self.assignment.dtype)
        return y
