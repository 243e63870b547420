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
        sinks: (B, S) the slots among them that are held as they were; None when nothing is compressed.
    """

    def __init__(self) -> None:
        self.members: list[GroupedLayer] = []
        self.bases: dict[str, Tensor] = {}
        self.sinks: Tensor | None = None

    def compress(self, num_new: int) -> None:
        """Compress what the members hold; called when all of them have taken in `num_new` tokens."""
        raise NotImplementedError

    def sink_rows(self, x: Tensor) -> Tensor:
        """`sinks` as an index (B, Hk, S, D) into the tokens of x (B, Hk, K, D)."""
        assert self.sinks is not None
        return self.sinks[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


class SharedBasis(LayerGroup):
    """xKV: one low-rank basis over the tokens per group for keys and one for values.

    Where the rank would not reduce anything (at least the number of tokens, or the group's width) the originals stay.
    Tokens that come later are taken into the same basis at the next `compress`, from their originals and the
    reconstruction of what was compressed before.

    Args:
        rank_k, rank_v: ranks of the keys and of the values; None leaves them uncompressed.
        sink_size: each row's first tokens that are held as they were, outside the basis; 0 is the published method.
        store: "factored" holds A once and B_l per layer; "dense" holds the product, as the published code does.
        randomized: see `cross_layer_svd`.
    """

    def __init__(
        self,
        rank_k: Rank | None,
        rank_v: Rank | None,
        sink_size: int = 0,
        store: Literal["factored", "dense"] = "factored",
        randomized: bool = False,
    ) -> None:
        super().__init__()
        self.ranks = {"keys": rank_k, "values": rank_v}
        self.sink_size, self.store, self.randomized = sink_size, store, randomized

    def compress(self, num_new: int) -> None:
        names = [name for name, rank in self.ranks.items() if rank is not None]
        wholes = {name: [layer.whole(name) for layer in self.members] for name in names}
        self.sinks, left_out = self._sinks()
        for name, xs in wholes.items():
            self._compress(name, xs, left_out)

    def _sinks(self) -> tuple[Tensor, Tensor]:
        """The slots of each row's first real tokens (B, S), and which tokens have no part in the basis (B, K)."""
        first = self.members[0]
        assert first.slots is not None
        valid = first.slots.valid
        real = torch.ones_like(first.slots.positions, dtype=torch.bool) if valid is None else valid
        real = real[:, 0]
        sinks = real.int().argsort(dim=-1, descending=True, stable=True)[:, : self.sink_size].clone()
        return sinks, (~real).scatter(1, sinks, True)

    def _compress(self, name: str, wholes: list[Tensor], left_out: Tensor) -> None:
        tokens, width = wholes[0].shape[2], sum(x.shape[1] * x.shape[3] for x in wholes)
        rank = self.ranks[name]
        if isinstance(rank, float):
            rank = max(1, round(rank * width))
        assert rank is not None
        if rank >= min(tokens, width):
            return
        # what is left out becomes zeros, which cost no rank
        xs = [x.masked_fill(left_out[:, None, :, None], 0.0).transpose(1, 2).flatten(2) for x in wholes]
        self.bases[name], factors = cross_layer_svd(xs, rank, self.randomized)
        for layer, whole, factor in zip(self.members, wholes, factors, strict=True):
            layer.factors[name] = factor
            layer.sinks[name] = whole.gather(2, self.sink_rows(whole))
            setattr(layer, name, whole[:, :, :0].clone())
        if self.store == "dense":
            for layer in self.members:
                setattr(layer, name, layer.whole(name))
                del layer.factors[name], layer.sinks[name]
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
        sinks: "keys" and "values" -> (B, Hk, S, ·), the tokens at the group's `sinks`.
        keys, values: the tokens that are not compressed.
    """

    def __init__(self, group: LayerGroup) -> None:
        super().__init__(raw_keys=True)
        self.group = group
        self.factors: dict[str, Tensor] = {}
        self.sinks: dict[str, Tensor] = {}
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
        product = product.unflatten(-1, (rest.shape[1], rest.shape[-1])).transpose(1, 2)
        whole = torch.cat((product, rest), dim=2)
        return whole.scatter_(2, self.group.sink_rows(whole), self.sinks[name])

    def compress(self, num_new: int) -> None:
        """Called when the layer has attended to its `num_new` tokens: the last layer of a group compresses all."""
        if self is self.group.members[-1]:
            self.group.compress(num_new)

    def keep(self, index: Tensor) -> None:
        raise Unsupported("layers that share their tokens' basis cannot drop tokens one by one")

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(function)
        self.factors = {name: function(factor) for name, factor in self.factors.items()}
        self.sinks = {name: function(sinks) for name, sinks in self.sinks.items()}
        group = self.group
        if self is group.members[0] and group.sinks is not None:  # once for the group: the cache calls every layer
            group.bases = {name: function(basis) for name, basis in group.bases.items()}
            group.sinks = function(group.sinks)

    def reset(self) -> None:
        super().reset()
        self.factors, self.sinks = {}, {}
        self.group.bases, self.group.sinks = {}, None
