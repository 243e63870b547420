"""Mixtures of heads on grids: the attentions of TransNeXt with MoH's router, as MoH-ViT has them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regard.mechanisms.grid.aggregated import AggregatedAttention, CosineAttention
from regard.mechanisms.heads.moh import RoutesHeads

_CPB = {"cpb_fc1": "cpb.0", "cpb_fc2": "cpb.2"}


class MixtureOfHeadCosineAttention(RoutesHeads, CosineAttention):
    """`CosineAttention` as a mixture of heads (MoH-ViT, arXiv:2410.11842): x (B, H, W, C) to the same, at any size.

        y = Wo [g_i o_i]_i        o_i of head i; the gates g as in `MixtureOfHeadAttention`, from x

    All heads are computed and gated. Exact; noncausal.

    Args:
        dim, num_heads, pretrain_grid, qkv_bias: as in `CosineAttention`.
        shared_heads, routed_heads: as in `MixtureOfHeadAttention`; all are shared by default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_grid: int | Sequence[int],
        qkv_bias: bool = True,
        shared_heads: int | None = None,
        routed_heads: int = 0,
    ):
        super().__init__(dim, num_heads, pretrain_grid, qkv_bias)
        self._add_router(dim, num_heads, num_heads if shared_heads is None else shared_heads, routed_heads)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        return super()._out(self._gate(y, self._route(x.flatten(1, 2))), x)

    @classmethod
    def from_official(  # type: ignore[override]
        cls, state_dict: dict[str, Tensor], *, num_heads: int = 8, **official: Any
    ) -> "MixtureOfHeadCosineAttention":
        """Weights of the published ``Attention`` of MoH-ViT; see `CosineAttention.from_official`."""
        module = super().from_official(state_dict, num_heads=num_heads, **_routed(num_heads, **official))
        assert isinstance(module, cls)
        return module


class MixtureOfHeadAggregatedAttention(RoutesHeads, AggregatedAttention):
    """`AggregatedAttention` as a mixture of heads (MoH-ViT, arXiv:2410.11842): x (B, H, W, C) to the same.

        y = Wo [g_i o_i]_i        o_i of head i, all its three sums; the gates g as in `MixtureOfHeadAttention`, from x

    All heads are computed and gated. Exact; noncausal.

    Args:
        dim, num_heads, pretrain_grid, window_size, sr_ratio, pool_size, qkv_bias: as in `AggregatedAttention`.
        shared_heads, routed_heads: as in `MixtureOfHeadAttention`; all are shared by default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_grid: int | Sequence[int],
        window_size: int = 3,
        sr_ratio: int = 8,
        pool_size: int | None = None,
        qkv_bias: bool = True,
        shared_heads: int | None = None,
        routed_heads: int = 0,
    ):
        super().__init__(dim, num_heads, pretrain_grid, window_size, sr_ratio, pool_size, qkv_bias)
        self._add_router(dim, num_heads, num_heads if shared_heads is None else shared_heads, routed_heads)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        return super()._out(self._gate(y, self._route(x.flatten(1, 2))), x)

    @classmethod
    def from_official(  # type: ignore[override]
        cls, state_dict: dict[str, Tensor], *, num_heads: int = 8, **official: Any
    ) -> "MixtureOfHeadAggregatedAttention":
        """Weights of the published ``AggregatedAttention`` of MoH-ViT; see `AggregatedAttention.from_official`."""
        module = super().from_official(state_dict, num_heads=num_heads, **_routed(num_heads, **official))
        assert isinstance(module, cls)
        return module


def _routed(num_heads: int, shared_head: int = 0, routed_head: int = 0, **official: Any) -> dict[str, Any]:
    """Published arguments with those about routing as ours; without routed heads all are shared."""
    shared = shared_head if routed_head else num_heads
    return {**official, "further": {"shared_heads": shared, "routed_heads": routed_head}}


def mixture_of_heads(attn: CosineAttention, shared_heads: int, routed_heads: int) -> CosineAttention:
    """A mixture of heads with the weights of trained attention of TransNeXt, and a router with random ones."""
    bias = getattr(attn, "qkv", getattr(attn, "q", None)).bias is not None  # type: ignore[union-attr]
    router: dict[str, Any] = {"qkv_bias": bias, "shared_heads": shared_heads, "routed_heads": routed_heads}
    same: tuple[Any, ...] = (attn.dim, attn.num_heads, attn.pretrain_grid)
    mixture: CosineAttention
    if isinstance(attn, AggregatedAttention):
        same += (attn.window_size, attn.sr_ratio, attn.pool_size)
        mixture = MixtureOfHeadAggregatedAttention(*same, **router)
    else:
        mixture = MixtureOfHeadCosineAttention(*same, **router)
    mixture.load_state_dict(mixture.state_dict() | attn.state_dict())
    return mixture.to(attn.proj.weight).train(attn.training)
