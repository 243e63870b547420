"""Agent attention: a few pooled tokens gather from all keys, then hand the result to all queries."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.mechanisms.base import Mechanism, Pattern, visible

_TABLE = 7  # height and width of the coarse bias tables, which are stretched to the grid


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    bias_agents: Tensor | None = None,
    bias_queries: Tensor | None = None,
    scale: float | None = None,
    scale_queries: float | None = None,
    valid: Tensor | None = None,
    agents_valid: Tensor | None = None,
) -> Tensor:
    """``softmax(s₂ Q Aᵀ + B₂) softmax(s A Kᵀ + B₁) V``, two small attentions in place of a large one.

    Args:
        q: (B, H, N, D).
        k: (B, Hk, M, D), v: (B, Hk, M, E).
        agents: (B, H, n, D).
        bias_agents: B₁ (H, n, M), bias_queries: B₂ (H, N, n).
        scale: s, 1/√D by default; scale_queries: s₂, equal to s by default.
        valid: (B, M) bool, False for padding.
        agents_valid: (B, n) bool, False for agents that stand for no token.

    Returns:
        (B, H, N, E).
    """
    gathered = attention(agents, k, v, mask=visible(1, False, valid), bias=bias_agents, scale=scale)
    unused = None if agents_valid is None else masks.padding(agents_valid)
    second = scale if scale_queries is None else scale_queries
    return attention(q, agents, gathered, mask=unused, bias=bias_queries, scale=second)


class AgentAttention(Mechanism):
    """Agent attention (arXiv:2312.08874).

        A = pool(q), n agents        y = Wo (softmax(q Aᵀ/√D + B₂) softmax(A kᵀ/√D + B₁) v + conv(v))

    Linear in N, with global context, and exact as defined: a generalised linear attention with the feature maps
    softmax(Q Aᵀ) and softmax(A Kᵀ). Noncausal only, because agents mix all positions. x (B, N, C) to (B, N, C).

    Without a grid the tokens are a sequence of any length, agents are the means of n equal pieces of it, and there are
    no biases. With a grid, tokens are its cells row by row, agents are pooled over √n × √n cells, and learned biases
    say which cells an agent reads and which read it; such a layer has a fixed size (`resize` changes it).

    Args:
        dim: C.
        num_heads: H.
        num_agents: n, a square number with a grid.
        grid: (height, width), or None for a sequence.
        class_token: a token before those of the grid, which takes part but is neither pooled nor convolved.
        kv_reduction: keys and values are those of a grid smaller by this factor, from a strided convolution.
        bias: of the query, key and value projections.
        kernel_size: of the depthwise convolution of the values, odd; 0 for none.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    cost: ClassVar[str] = "O(N n C), n agents"
    causal = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_agents: int = 49,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        kv_reduction: int = 1,
        bias: bool = True,
        kernel_size: int = 3,
    ):
        super().__init__()
        per_head(dim, num_heads)
        side = int(num_agents**0.5)
        if num_agents < 1 or (grid is not None and side * side != num_agents):
            raise ArgumentError(f"num_agents: expected at least 1, and a square number with a grid; got {num_agents}")
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise ArgumentError(f"kernel_size: expected 0 or an odd number, got {kernel_size}")
        if grid is None and (class_token or kv_reduction != 1):
            raise ArgumentError("grid: needed for class_token and kv_reduction")
        if grid is not None and (grid[0] % kv_reduction or grid[1] % kv_reduction):
            raise ArgumentError(f"kv_reduction: {kv_reduction} does not divide the grid {grid[0]} x {grid[1]}")
        self.dim, self.num_heads, self.num_agents = dim, num_heads, num_agents
        self.grid, self.class_token, self.kv_reduction, self.kernel_size = grid, class_token, kv_reduction, kernel_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.dwc: nn.Module | None = None
        if kernel_size:
            around: dict[str, Any] = {"padding": kernel_size // 2, "groups": dim}
            self.dwc = (nn.Conv1d if grid is None else nn.Conv2d)(dim, dim, kernel_size, **around)
        if grid is not None:
            self.biases = AgentBiases(num_heads, num_agents, grid, kv_reduction, class_token)
        self.reduce = self.norm = None
        if kv_reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, kv_reduction, stride=kv_reduction)
            self.norm = nn.LayerNorm(dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self.o_proj(self._sequence(x, valid) if self.grid is None else self._grid(x, valid, *self.grid))

    def _sequence(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, v = self.q_proj(x), self.v_proj(x)
        if valid is not None:
            v = v * valid.unsqueeze(-1)
        agents, used = mean_of_pieces(q, self.num_agents, valid)
        heads = (split_heads(t, self.num_heads) for t in (q, self.k_proj(x), v, agents))
        out = agent_attention(*heads, valid=valid, agents_valid=used)
        return merge_heads(out) if self.dwc is None else merge_heads(out) + self.dwc(v.mT).mT

    def _grid(self, x: Tensor, valid: Tensor | None, height: int, width: int) -> Tensor:
        first = int(self.class_token)
        if valid is not None:
            raise Unsupported("valid: a grid has no padding")
        if x.shape[1] != first + height * width:
            extra = " and a class token" if first else ""
            raise ShapeError(f"x: expected {height} x {width} tokens{extra}, got {x.shape[1]}")
        q, source = self.q_proj(x), x
        if self.reduce is not None:
            assert self.norm is not None
            image = x[:, first:].mT.unflatten(2, (height, width))
            source = torch.cat([x[:, :first], self.norm(self.reduce(image).flatten(2).mT)], 1)
        k, v = self.k_proj(source), self.v_proj(source)
        pooled = F.adaptive_avg_pool2d(q[:, first:].mT.unflatten(2, (height, width)), int(self.num_agents**0.5))
        b1, b2 = self.biases()
        heads = (split_heads(t, self.num_heads) for t in (q, k, v, pooled.flatten(2).mT))
        y = merge_heads(agent_attention(*heads, bias_agents=b1, bias_queries=b2))
        if self.dwc is None:
            return y
        image = v[:, first:].mT.unflatten(2, (height // self.kv_reduction, width // self.kv_reduction))
        if self.kv_reduction > 1:
            image = F.interpolate(image, (height, width), mode="bilinear")
        local = self.dwc(image).flatten(2).mT
        return torch.cat([y[:, :first], y[:, first:] + local], 1) if first else y + local

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, variant: str = "deit", **official_kwargs: Any
    ) -> "AgentAttention":
        """The ``AgentAttention`` of the published "deit", "pvt" and "swin" models.

        Also called "deit-attention" and so on, because the catalogue knows the models themselves by the short names.
        """
        given, state = official_kwargs, dict(state_dict)
        variant = variant.removesuffix("-attention")
        grid: tuple[int, int]
        if variant == "deit":
            grid = (given.get("window", 14),) * 2
        elif variant == "pvt":
            grid = (int(given["num_patches"] ** 0.5),) * 2
        elif variant == "swin":
            height, width = given["window_size"]
            grid = (height, width)
        else:
            raise ArgumentError(f"variant: expected deit, pvt or swin, got {variant!r}")
        module = cls(
            given["dim"],
            given.get("num_heads", 8),
            given.get("agent_num", 49),
            grid,
            class_token=variant == "deit",
            kv_reduction=given.get("sr_ratio", 1) if variant == "pvt" else 1,
            bias=given.get("qkv_bias", variant == "swin"),
        )
        load_strictly(module, state, own_names(state))
        return module


def own_names(state: dict[str, Tensor], old: str = "", new: str = "") -> dict[str, str]:
    """Cut the fused projections of the published layer whose names begin with ``old``, in place.

    Returns what else of it has another name in an `AgentAttention` whose names begin with ``new``.
    """
    split_rows(state, f"{old}qkv", (f"{old}q_proj", f"{old}k_proj", f"{old}v_proj"))
    split_rows(state, f"{old}kv", (f"{old}k_proj", f"{old}v_proj"))
    names = {"q": "q_proj", "proj": "o_proj", "sr": "reduce"}
    names |= {f"{pair}_bias": f"biases.{pair}_bias" for pair in ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")}
    return {f"{old}{theirs}": f"{new}{ours}" for theirs, ours in names.items()}


class AgentBiases(nn.Module):
    """B₁ (H, n, M), from agents to keys, and B₂ (H, N, n), from queries to agents.

    Each is a coarse table stretched to the grid, plus a term per row and one per column; the class token has its own.
    """

    def __init__(self, num_heads: int, num_agents: int, grid: tuple[int, int], kv_reduction: int, class_token: bool):
        super().__init__()
        self.grid, self.kv_grid = grid, (grid[0] // kv_reduction, grid[1] // kv_reduction)
        h, n = num_heads, num_agents

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

        self.an_bias, self.na_bias = table(h, n, _TABLE, _TABLE), table(h, n, _TABLE, _TABLE)
        self.ah_bias, self.aw_bias = table(1, h, n, self.kv_grid[0], 1), table(1, h, n, 1, self.kv_grid[1])
        self.ha_bias, self.wa_bias = table(1, h, grid[0], 1, n), table(1, h, 1, grid[1], n)
        self.ac_bias = table(1, h, n, 1) if class_token else None
        self.ca_bias = table(1, h, 1, n) if class_token else None

    def forward(self) -> tuple[Tensor, Tensor]:
        to_keys = F.interpolate(self.an_bias, self.kv_grid, mode="bilinear").flatten(2)
        to_keys = to_keys + (self.ah_bias + self.aw_bias).flatten(3)[0]
        from_queries = F.interpolate(self.na_bias, self.grid, mode="bilinear").flatten(2).mT
        from_queries = from_queries + (self.ha_bias + self.wa_bias).flatten(2, 3)[0]
        if self.ac_bias is not None:
            assert self.ca_bias is not None
            to_keys = torch.cat([self.ac_bias[0], to_keys], -1)
            from_queries = torch.cat([self.ca_bias[0], from_queries], -2)
        return to_keys, from_queries


def resize(layer: AgentAttention, grid: tuple[int, int]) -> AgentAttention:
    """The same layer for another grid: its row and column biases are interpolated linearly.

    Raises:
        ArgumentError: a layer for sequences, which has no size.
    """
    if layer.grid is None:
        raise ArgumentError("layer: this one is for sequences and has no grid")
    other = AgentAttention(
        layer.dim,
        layer.num_heads,
        layer.num_agents,
        grid,
        layer.class_token,
        layer.kv_reduction,
        layer.q_proj.bias is not None,
        layer.kernel_size,
    )
    other = other.to(layer.o_proj.weight).train(layer.training)
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    for name, axis in (("ah_bias", 3), ("aw_bias", 4), ("ha_bias", 2), ("wa_bias", 3)):
        size = getattr(other.biases, name).shape[axis]
        state[f"biases.{name}"] = _stretch(state[f"biases.{name}"], axis, size)
    other.load_state_dict(state)
    return other


def _stretch(table: Tensor, axis: int, size: int) -> Tensor:
    last = table.movedim(axis, -1)
    return F.interpolate(last.flatten(1, -2), size, mode="linear").view(*last.shape[:-1], size).movedim(-1, axis)


def mean_of_pieces(x: Tensor, count: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Means (B, count, C) of consecutive pieces of equal length of x (B, N, C), leaving padding out.

    A sequence with fewer tokens than pieces fills only as many as it has tokens; the second result (B, count) bool says
    which are filled, None if all are.
    """
    batch, n = x.shape[:2]
    if valid is None and n % count == 0:  # the usual case, several times faster
        return x.unflatten(1, (count, n // count)).mean(2), None
    if valid is None:
        rank, length = torch.arange(n, device=x.device).expand(batch, n), x.new_full((batch, 1), n, dtype=torch.long)
    else:
        rank, length = valid.cumsum(1) - 1, valid.sum(1, keepdim=True).clamp(min=1)
    pieces = length.clamp(max=count)
    piece = (
        (rank * pieces).div(length, rounding_mode="floor").clamp(min=0)
    )  # (B, N); before the first token, rank is -1
    kept = x if valid is None else x * valid.unsqueeze(-1)
    ones = x.new_ones(batch, n) if valid is None else valid.to(x.dtype)
    sizes = x.new_zeros(batch, count).scatter_add(1, piece, ones)
    sums = x.new_zeros(batch, count, x.shape[2]).scatter_add(1, piece.unsqueeze(-1).expand_as(x), kept)
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    return means, None if valid is None and n >= count else sizes > 0
