"""AgentSD: agent attention in a pretrained diffusion model, on merged tokens and without training."""

from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.layers.merging import GridMerge
from regard.mechanisms.linear.agent import agent_attention


class MergedAgentAttention(nn.Module, PyTorchModelHubMixin):
    """Self-attention of a diffusion model's block made cheaper (AgentSD, arXiv:2312.08874).

        X = merge(x), N (1 - ratio) tokens        A = to_q(merge(x)) with agent_ratio, far fewer
        y = unmerge(to_out(softmax(s^k₂ Q Aᵀ) softmax(s A Kᵀ) V + k_s V)),        s = 1/√D

    The weights are those of ordinary attention. Agents are used only where there are less than half as many as tokens;
    otherwise this is attention on merged tokens. Approximate: merged tokens share one output.

    Args:
        dim: C.
        num_heads: H.
        cell: height and width of the cells of the grid that have one destination for merging each.
        ratio: share of the tokens that are merged away.
        agent_ratio: share that is merged away to get agents.
        query_exponent: k₂.
        shortcut: k_s.
    """

    cost: ClassVar[str] = "O(N n C) and O(N² C) for the matching"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        cell: tuple[int, int] = (4, 4),
        ratio: float = 0.4,
        agent_ratio: float = 0.95,
        query_exponent: float = 0.3,
        shortcut: float = 0.075,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        for name, value in (("ratio", ratio), ("agent_ratio", agent_ratio)):
            if not 0 <= value < 1:
                raise ArgumentError(f"{name}: expected a share in [0, 1), got {value}")
        self.dim, self.num_heads, self.cell = dim, num_heads, (cell[0], cell[1])
        self.ratio, self.agent_ratio = ratio, agent_ratio
        self.query_exponent, self.shortcut = query_exponent, shortcut
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], offset: Tensor | None = None) -> Tensor:
        """x (B, H W, C), grid (H, W); ``offset`` picks the destination in each cell, see `GridMerge.match`."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H W, {self.dim}), got {tuple(x.shape)}")
        with torch.no_grad():
            merging = GridMerge.match(x, grid, self.cell, offset)
        count, most = (int(x.shape[1] * ratio + 1e-6) for ratio in (self.ratio, self.agent_ratio))
        agents = merging.merge(x, most)
        return merging.unmerge(self.attend(merging.merge(x, count), agents), count)

    def attend(self, x: Tensor, agents: Tensor) -> Tensor:
        """Merged tokens (B, N', C) and agents (B, n, C) to (B, N', C)."""
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.to_q, self.to_k, self.to_v))
        if 2 * agents.shape[1] >= x.shape[1]:
            return self.to_out(merge_heads(attention(q, k, v)))
        a, scale = split_heads(self.to_q(agents), self.num_heads), self.head_dim**-0.5
        out = agent_attention(q, k, v, a, scale=scale, scale_queries=scale**self.query_exponent)
        return self.to_out(merge_heads(out + self.shortcut * v))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "MergedAgentAttention":
        """Weights of a diffusion model's attention, and AgentSD's settings; counts are turned into shares."""
        given = official_kwargs
        tokens = given["h"] * given["w"]
        module = cls(
            given["dim"],
            given["heads"],
            (given["sy"], given["sx"]),
            given["r"] / tokens,
            given["agent_r"] / tokens,
            given.get("k_scale2", 0.3),
            given.get("k_shortcut", 0.075),
        )
        load_strictly(module, state_dict, {"to_out.0": "to_out"})
        return module
