"""LargeGT's tokens: a sample of each node's neighbours, with features averaged over hops (arXiv:2312.11109)."""

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError


class LargeGTSampler:
    """Token sequences of the nodes of a graph.

    The sequence of node i is i and K - 1 others, drawn without repetition from the list of its neighbours followed by
    the list of their neighbours, so what stands in both counts twice. A shorter list is repeated in its order; a node
    without neighbours draws from all. Each of the K nodes gives three tokens: X, ÂX and ÂÂX with

        Â = C^-½ (A + I) R^-½       R, C the sums of the rows and of the columns of A + I

    The draw for a node depends on the seed and the node alone, so nothing is stored and it is the same in every epoch.

    Args:
        adj: (N, N) adjacency, a `torch.sparse_csr` tensor; an entry (i, j) makes j a neighbour of i.
        x: (N, F) features, on the device of ``adj``, where the tokens are made too.
        sample_node_len: K.
        seed: of the draws.

    Attributes:
        features: (N, 3, F): X, ÂX, ÂÂX.
    """

    def __init__(self, adj: Tensor, x: Tensor, sample_node_len: int, seed: int = 0):
        n = x.shape[0]
        if x.dim() != 2:
            raise ShapeError(f"x: expected (N, F), got {tuple(x.shape)}")
        if adj.layout != torch.sparse_csr or tuple(adj.shape) != (n, n):
            raise ShapeError(
                f"adj: expected a sparse_csr tensor of shape {(n, n)}, got {adj.layout} {tuple(adj.shape)}"
            )
        if sample_node_len < 1:
            raise ArgumentError(f"sample_node_len: expected at least 1, got {sample_node_len}")
        first, neighbours = adj.crow_indices().long(), adj.col_indices().long()
        self._first, self._neighbours = first.cpu(), neighbours.cpu()  # drawing is done there
        if sample_node_len - 1 > n and bool((self._first.diff() == 0).any()):
            raise ArgumentError(f"sample_node_len: a node has no neighbours, and {sample_node_len - 1} exceeds all {n}")
        self.num_nodes, self.sample_node_len, self.seed = n, sample_node_len, seed
        values = adj.values().to(x.dtype)
        rows = values.new_ones(n).index_add(0, torch.repeat_interleave(first.diff()), values)
        columns = values.new_ones(n).index_add(0, neighbours, values)
        adj = torch.sparse_csr_tensor(first, neighbours, values, (n, n))
        hops = [x]
        for _ in range(2):
            scaled = hops[-1] * rows.rsqrt().unsqueeze(1)
            hops.append((adj @ scaled + scaled) * columns.rsqrt().unsqueeze(1))
        self.features = torch.stack(hops, 1)

    def nodes(self, batch_idx: Tensor) -> Tensor:
        """The K nodes of each of the sequences, (B, K) on the CPU; the nodes ``batch_idx`` (B,) come first."""
        if batch_idx.dim() != 1 or batch_idx.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"batch_idx: expected integers (B,), got {batch_idx.dtype} {tuple(batch_idx.shape)}")
        if batch_idx.numel() and not 0 <= int(batch_idx.min()) <= int(batch_idx.max()) < self.num_nodes:
            raise ArgumentError(
                f"batch_idx: expected nodes from 0 to {self.num_nodes - 1}, got {batch_idx.tolist()[:8]}"
            )
        return torch.stack([self._sequence(node) for node in batch_idx.tolist()])

    def __call__(self, batch_idx: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, 3K, F), three for each node of a sequence, and the features (B, F) of the nodes themselves."""
        return self.features[self.nodes(batch_idx)].flatten(1, 2), self.features[batch_idx, 0]

    def candidates(self, node: int) -> Tensor:
        """The neighbours of a node, then the nodes two steps away by any path, each once in each list."""
        near = self._neighbours[self._first[node] : self._first[node + 1]]
        length = self._first[near + 1] - self._first[near]
        start = (self._first[near] - length.cumsum(0) + length).repeat_interleave(length)
        return torch.cat([near, self._neighbours[start + torch.arange(len(start))].unique()])

    def _sequence(self, node: int) -> Tensor:
        count, candidates = self.sample_node_len - 1, self.candidates(node)
        generator = torch.Generator().manual_seed(self.seed * self.num_nodes + node)
        if len(candidates) == 0:
            candidates = torch.randperm(self.num_nodes, generator=generator)
        elif len(candidates) >= count:
            candidates = candidates[torch.randperm(len(candidates), generator=generator)]
        else:
            candidates = candidates.repeat(-(-count // len(candidates)))
        return torch.cat([torch.tensor([node]), candidates[:count]])
