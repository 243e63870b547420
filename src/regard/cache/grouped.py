"""Cache layers that are compressed together, several layers of the model at a time."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from regard.cache.layer import TrackedLayer
from regard.cache.xkv import cross_layer_svd, minicache_merge
from regard.errors import Unsupported

#: a rank in numbers, or as a share of the group's width Σ Hk·D
Rank = int | float


class LayerGroup:
    """What the layers of a group share: how they are compressed, and the bases of the compressed tokens.

    Attributes:
        members: the group's layers, in order.
        bases: "keys" and "values" -> A (B, N, r) over the N compressed tokens.
    """

    def __init__(self) -> None:
        self.members: list[GroupedLayer] = []
        self.bases: dict[str, Tensor] = {}

    def compress(self, num_new: int) -> None:
        """Compress what the members hold; called when all of them have taken in `num_new` tokens."""
        raise NotImplementedError


class SharedBasis(LayerGroup):
    """xKV: one low-rank basis over the tokens per group for keys and one for values.

    Where the rank would not reduce anything (at least the number of tokens, or the group's width) the originals stay.
    Tokens that come later are taken into the same basis at the next `compress`, from their originals and the
    reconstruction of what was compressed before.

    Args:
        rank_k, rank_v: ranks of the keys and of the values; None leaves them uncompressed.
        store: "factored" holds A once and B_l per layer; "dense" holds the product, as the published code does.
        randomized: see `cross_layer_svd`.
    """

    def __init__(
        self,
        rank_k: Rank | None,
        rank_v: Rank | None,
        store: Literal["factored", "dense"] = "factored",
        randomized: bool = False,
    ) -> None:
        super().__init__()
        self.ranks = {"keys": rank_k, "values": rank_v}
        self.store, self.randomized = store, randomized

    def compress(self, num_new: int) -> None:
        for name, rank in self.ranks.items():
            if rank is not None:
                self._compress(name, rank)

    def _compress(self, name: str, rank: Rank) -> None:
        xs = [layer.real_tokens(name).transpose(1, 2).flatten(2) for layer in self.members]
        width = sum(x.shape[-1] for x in xs)
        if isinstance(rank, float):
            rank = max(1, round(rank * width))
        if rank >= min(xs[0].shape[1], width):
            return
        basis, factors = cross_layer_svd(xs, rank, self.randomized)
        self.bases[name] = basis
        for layer, factor in zip(self.members, factors, strict=True):
            layer.factors[name] = factor
            rest = getattr(layer, name)
            setattr(layer, name, rest.new_empty(*rest.shape[:2], 0, rest.shape[-1]))
        if self.store == "dense":
            for layer in self.members:
                setattr(layer, name, layer.whole(name))
                del layer.factors[name]
            del self.bases[name]


class MergedPair(LayerGroup):
    """MiniCache as the published code of xKV simulates it: two layers, nothing saved. See `minicache_merge`."""

    def __init__(self, merge_key: bool, merge_value: bool, t: float, gamma: float) -> None:
        super().__init__()
        self.names = [name for name, merge in (("keys", merge_key), ("values", merge_value)) if merge]
        self.t, self.gamma = t, gamma

    def compress(self, num_new: int) -> None:
        for name in self.names:
            xs = [getattr(layer, name) for layer in self.members]
            new = torch.zeros(xs[0].shape[:3], dtype=torch.bool, device=xs[0].device)
            new[..., -num_new:] = True
            slots = self.members[0].slots
            if slots is not None and slots.valid is not None:
                new &= slots.valid
            merged = minicache_merge(xs[0][new], xs[1][new], self.t, self.gamma)
            for layer, x, rows in zip(self.members, xs, merged, strict=True):
                setattr(layer, name, x.masked_scatter(new[..., None], rows))


class GroupedLayer(TrackedLayer):
    """A layer of a group: compressed tokens as its share of the group's factors, later ones as they came.

    `update` returns all tokens, keys before rotation, the compressed ones reconstructed.

    Attributes:
        factors: "keys" and "values" -> B_l (B, r, Hk·D), for what is compressed.
        keys, values: the tokens that are not compressed.
    """

    def __init__(self, group: LayerGroup) -> None:
        super().__init__(raw_keys=True)
        self.group = group
        self.factors: dict[str, Tensor] = {}
        group.members.append(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        return self.whole("keys"), self.whole("values")

    def whole(self, name: str) -> Tensor:
        """The keys or the values of all tokens (B, Hk, K, ·)."""
        rest: Tensor = getattr(self, name)
        if name not in self.factors:
            return rest
        product = self.group.bases[name] @ self.factors[name]
        return torch.cat((product.unflatten(-1, (rest.shape[1], rest.shape[-1])).transpose(1, 2), rest), dim=2)

    def real_tokens(self, name: str) -> Tensor:
        """`whole`, with zeros for padding, which so costs no rank."""
        assert self.slots is not None
        whole = self.whole(name)
        return whole if self.slots.valid is None else whole * self.slots.valid[..., None]

    def compress(self, num_new: int) -> None:
        """Called when the layer has attended to its `num_new` tokens: the last layer of a group compresses all."""
        if self is self.group.members[-1]:
            self.group.compress(num_new)

    def keep(self, index: Tensor) -> None:
        raise Unsupported("layers that share their tokens' basis cannot drop tokens one by one")

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(function)
        self.factors = {name: function(factor) for name, factor in self.factors.items()}
        if self is self.group.members[0]:  # once for the group: the cache calls every layer
            self.group.bases = {name: function(basis) for name, basis in self.group.bases.items()}

    def reset(self) -> None:
        super().reset()
        self.factors = {}
        self.group.bases = {}
