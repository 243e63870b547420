"""MoH: every token picks which attention heads contribute, and how much."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible
from regard.mechanisms.softmax import SoftmaxAttention
from regard.positions import rotate_tokens

ROUTERS = ("learned", "query_norm")


class Routing(NamedTuple):
    """How the tokens of the last call were routed.

    Attributes:
        gates: (B, N, H), factor of each head's output.
        mask: (B, N, H_r) bool, the routed heads that are active.
        balance_loss: scalar, ``H_r² mean_i(mean_t p_ti · mean_t m_ti)``; differentiable.
    """

    gates: Tensor
    mask: Tensor
    balance_loss: Tensor


class RoutesHeads(nn.Module):
    """What mixtures of heads have in common: the learned router, its gates, and `last_routing`."""

    num_heads: int
    shared_heads: int
    routed_heads: int
    last_routing: Routing | None = None

    def _add_router(self, dim: int, num_heads: int, shared: int, routed: int, learned: bool = True) -> None:
        if not 0 <= shared <= num_heads:
            raise ArgumentError(f"shared_heads: expected 0 to {num_heads}, got {shared}")
        if not 0 <= routed <= num_heads - shared:
            raise ArgumentError(f"routed_heads: expected 0 to {num_heads - shared}, got {routed}")
        self.shared_heads, self.routed_heads = shared, routed
        self.wg = nn.Linear(dim, num_heads - shared, bias=False) if learned and routed else None
        self.wg_1 = nn.Linear(dim, shared, bias=False) if learned and (shared > 1) else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if learned and shared and routed else None

    def _route(self, x: Tensor) -> Routing:
        """The gates for tokens x (B, N, C)."""
        k, shared = self.routed_heads, self.shared_heads
        gates, probabilities, mask = [], x.new_zeros(*x.shape[:2], 0), x.new_zeros(*x.shape[:2], 0).bool()
        if shared:
            # the published code leaves the head alone where it is the only shared one
            gates.append(x.new_ones(*x.shape[:2], 1) if self.wg_1 is None else shared * self.wg_1(x).softmax(-1))
        if self.wg is not None:
            probabilities = self.wg(x).softmax(-1)
            mask = _top(probabilities, k)
            kept = probabilities * mask
            total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).eps)
            gates.append(k * kept / total)
        elif self.num_heads > shared:  # nothing is routed
            gates.append(x.new_zeros(*x.shape[:2], self.num_heads - shared))
        if self.wg_0 is not None:
            both = 2 * self.wg_0(x).softmax(-1)
            gates = [part * both[..., i : i + 1] for i, part in enumerate(gates)]
        return Routing(torch.cat(gates, -1), mask, _balance(probabilities, mask))

    def _gate(self, out: Tensor, routing: Routing) -> Tensor:
        """What heads found, (B, H, N, D), times their gates."""
        self.last_routing = routing
        return out * routing.gates.transpose(1, 2).unsqueeze(-1).to(out.dtype)


class MixtureOfHeadAttention(RoutesHeads, Mechanism):
    """Multi-head attention as a mixture of heads (MoH, arXiv:2410.11842).

        p = softmax(x Wg),  m = top-k(p)                    over the H_r routed heads
        g_r = k p m / Σ(p m),  g_s = H_s softmax(x W1)      routed and shared heads
        (a_s, a_r) = 2 softmax(x W0)                        where there are both
        y = Wo [g_i o_i]_i,  g = [a_s g_s, a_r g_r]         o_i is ordinary softmax attention

    x (B, N, C) to (B, N, C). The first ``shared_heads`` are always active. Gates multiply the outputs of heads for each
    query token, so keys and values of all heads are needed and the cache does not shrink. All heads are computed and
    gated, as in the published code: exact, without its possible saving. With gates of one this is multi-head attention.

    The "query_norm" router has no weights (for models that were trained dense): r_i = ‖q_i‖ before rotation, the top k
    of p = softmax(r / std r) are active, and gates are 1 or 0. In training these gates have the gradient of p
    (straight-through, arXiv:1308.3432).

    `convert_mha_to_moh` makes a layer from trained attention. Training adds 0.01 `moh_balance_loss` to the loss.

    Args:
        dim, num_heads, num_kv_heads, head_dim: C, H, key heads and D.
        shared_heads: H_s; the other heads are routed.
        routed_heads: k of them are active per token.
        qkv_bias, proj_bias: of the projections.
        qk_norm: LayerNorm over each head of q and k.
        router: "learned" or "query_norm".
        rope_theta: base of rotary angles; None for none.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar[Literal["constant", "growing"] | None] = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        qk_norm: bool = False,
        router: str = "learned",
        rope_theta: float | None = None,
        causal: bool = True,
    ):
        super().__init__()
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        shared = num_heads // 4 if shared_heads is None else shared_heads
        routed = (num_heads - shared + 1) // 2 if routed_heads is None else routed_heads
        if router not in ROUTERS:
            raise ArgumentError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.router, self.rope_theta = router, rope_theta
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self._add_router(dim, num_heads, shared, routed, router == "learned")

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v, routing = self._prepare(x)
        return self._mix(attention(q, k, v, mask=visible(x.shape[1], self.causal, valid)), routing)

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v, routing = self._prepare(x, past)
        state = KV.append(state, k, v, valid)
        out = attention(q, state.key, state.value, mask=visible(x.shape[1], True, state.valid, past))
        return self._mix(out, routing), state

    def _prepare(self, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor, Routing]:
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(x), self.num_kv_heads))
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        routing = self.route(x, q)
        return rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past), v, routing

    def _mix(self, out: Tensor, routing: Routing) -> Tensor:
        return self.o_proj(merge_heads(self._gate(out, routing)))

    def route(self, x: Tensor, q: Tensor) -> Routing:
        """The gates for tokens x (B, N, C) with queries (B, H, N, D) before rotation."""
        if self.router == "query_norm":
            return self._route_by_norm(q)
        return self._route(x)

    def _route_by_norm(self, q: Tensor) -> Routing:
        norms = q[:, self.shared_heads :].norm(dim=-1).transpose(1, 2)  # (B, N, H_r)
        spread = norms.std(-1, keepdim=True) if norms.shape[-1] > 1 else torch.zeros_like(norms)
        probabilities = (norms / torch.where(spread > 0, spread, 1.0)).softmax(-1)
        mask = _top(probabilities, self.routed_heads)
        routed = mask.to(q.dtype)
        if self.training:
            routed = routed + (probabilities - probabilities.detach())
        shared = routed.new_ones(*mask.shape[:2], self.shared_heads)
        return Routing(torch.cat([shared, routed], -1), mask, _balance(probabilities, mask))

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, variant: str = "dit", **official_kwargs: Any
    ) -> "MixtureOfHeadAttention":
        """``variant`` "dit" (``MoHAttention`` of MoH-DiT) or "llama" (``LlamaAttention`` of MoH-LLaMA3).

        Also called "dit-attention", because the catalogue knows the whole network by the short name.
        """
        state = dict(state_dict)
        if variant in ("dit", "dit-attention"):
            dim, heads = official_kwargs["dim"], official_kwargs.get("num_heads", 8)
            shared, routed = official_kwargs.get("shared_head", 0), official_kwargs.get("routed_head", 0)
            shared = heads if routed == 0 else shared  # without routed heads all are shared
            fused = len(state["qkv.weight"]) // 3
            split_rows(state, "qkv", ("q_proj", "k_proj", "v_proj"))
            module = cls(
                dim,
                heads,
                head_dim=fused // heads,
                shared_heads=shared,
                routed_heads=routed,
                qkv_bias="q_proj.bias" in state,
                qk_norm=official_kwargs.get("qk_norm", False),
                causal=False,
            )
            load_strictly(module, state, {"proj": "o_proj"})
            return module
        if variant != "llama":
            raise ArgumentError(f"variant: expected dit or llama, got {variant!r}")
        heads = official_kwargs["num_attention_heads"]
        module = cls(
            official_kwargs["hidden_size"],
            heads,
            official_kwargs.get("num_key_value_heads"),
            official_kwargs.get("head_dim"),
            shared_heads=heads // 2,
            routed_heads=int((0.75 - 0.5) * heads),
            qkv_bias=official_kwargs.get("attention_bias", False),
            proj_bias=official_kwargs.get("attention_bias", False),
            router="query_norm",
            rope_theta=official_kwargs.get("rope_theta", 10_000.0),
        )
        load_strictly(module, state)
        return module


def convert_mha_to_moh(
    attn: SoftmaxAttention, shared_heads: int, routed_heads: int, router: str = "query_norm"
) -> MixtureOfHeadAttention:
    """A mixture of heads with the weights of multi-head attention, to tune on; all heads active, it computes the same.

    "query_norm" is what the paper tunes a pretrained model with; a "learned" router starts with random weights.

    Raises:
        ArgumentError: numbers of heads that do not fit.
        Unsupported: attention with a window or with norms of queries and keys, which this mechanism has not.
    """
    if type(attn) is not SoftmaxAttention or attn.window_size is not None or not isinstance(attn.q_norm, nn.Identity):
        raise Unsupported("attn: expected SoftmaxAttention without window_size or qk_norm, which MoH does not have")
    bias = attn.q_proj.bias is not None
    moh = MixtureOfHeadAttention(
        attn.dim,
        attn.num_heads,
        attn.num_kv_heads,
        attn.head_dim,
        shared_heads,
        routed_heads,
        qkv_bias=bias,
        proj_bias=bias,
        router=router,
        rope_theta=attn.rope_theta,
        causal=attn.causal,
    )
    moh.load_state_dict(moh.state_dict() | attn.state_dict())
    return moh.to(attn.q_proj.weight).train(attn.training)


def moh_balance_loss(model: nn.Module) -> Tensor:
    """The mean of the balance losses of all MoH layers that route, in their last call; the paper adds 0.01 times this.

    Raises:
        ArgumentError: the model has no MoH layer, or none has run.
    """
    layers = [m for m in model.modules() if isinstance(m, RoutesHeads)]
    found = [layer.last_routing for layer in layers if layer.last_routing is not None]
    if not found:
        raise ArgumentError("model: expected MoH layers that have run, found none")
    routed = [routing.balance_loss for routing in found if routing.mask.shape[-1]]
    return torch.stack(routed).mean() if routed else found[0].balance_loss


def _top(probabilities: Tensor, k: int) -> Tensor:
    index = probabilities.topk(k, dim=-1).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, index, True)


def _balance(probabilities: Tensor, mask: Tensor) -> Tensor:
    heads = probabilities.shape[-1]
    if heads == 0:
        return probabilities.new_zeros(())
    each = probabilities.flatten(0, 1).mean(0) * mask.flatten(0, 1).to(probabilities.dtype).mean(0)
    return heads**2 * each.mean()
