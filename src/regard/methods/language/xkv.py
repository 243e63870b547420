"""xKV (arXiv:2503.18893): after the prompt, keys and values of neighbouring layers share one low-rank basis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from regard.cache import GroupedLayer, LayerGroup, MergedPair, SharedBasis, TrackedLayer, group_layers
from regard.cache.grouped import Rank
from regard.errors import ArgumentError
from regard.methods.language.policy import CachePolicy, rotate_keys
from regard.sites import Call, Site

Ranks = Rank | Sequence[Rank]


@dataclass(kw_only=True)
class XKV(CachePolicy):
    """Replace the prompt's keys (before rotation) and values by low-rank factors shared by groups of layers.

    The prompt attends to its originals; decoding reads the reconstruction, and new tokens are held as they are. Held
    per group of G layers, for N prompt tokens of width d = Hk·D: N·r + r·G·d numbers instead of N·G·d, for keys and
    values each; that saves when r < N·G·d / (N + G·d). Reconstructing costs 2·N·r·d operations per layer, for keys
    and for values, at every step. Every forward of several tokens compresses all that is held by then.

    Needs a model with rotary embedding.

    Args:
        rank: rank of both keys and values, in place of `rank_k` and `rank_v`.
        rank_k, rank_v: ranks, as a number or as a share of the group's width G·d (a float); one for all groups or
            one per group. A rank not below N or G·d leaves the originals (the paper's runs: 0.125 and 0.1875 of
            a width of 4096).
        group_size: consecutive layers per group; the last group may be shorter.
        groups: the groups themselves, as lists of layer indices, in place of `group_size`.
        sink_size: first tokens of each row that are held as they were. The published method is 0. The values of
            attention sinks are close to zero and receive much of all attention, so what the low rank gets wrong about
            them spoils every output.
        start_layer, end_layer: first and last layer to group; -1 is the model's last.
        merge_key, merge_value: what to compress.
        store: "factored" holds the factors; "dense" the reconstruction, as the published code, which saves nothing.
        randomized: sample the subspace instead of computing it exactly: faster, and uses torch's random generator.
        layer_merge_impl: "svd", or "slerp" for the MiniCache baseline on pairs of layers, with `slerp_t` and
            `slerp_gamma` as in `regard.cache.minicache_merge`; it saves nothing.
    """

    name: ClassVar[str] = "xkv"
    rank: Rank | None = None
    rank_k: Ranks = 0.25
    rank_v: Ranks = 0.375
    group_size: int = 4
    groups: Sequence[Sequence[int]] | None = None
    sink_size: int = 4
    start_layer: int = 0
    end_layer: int = -1
    merge_key: bool = True
    merge_value: bool = True
    store: Literal["factored", "dense"] = "factored"
    randomized: bool = False
    layer_merge_impl: Literal["svd", "slerp"] = "svd"
    slerp_t: float = 0.5
    slerp_gamma: float = 1.0

    def __post_init__(self) -> None:
        for argument, choices in (("store", ("factored", "dense")), ("layer_merge_impl", ("svd", "slerp"))):
            if getattr(self, argument) not in choices:
                raise ArgumentError(f"{argument} must be {' or '.join(choices)}, got {getattr(self, argument)!r}")
        for argument in ("rank", "rank_k", "rank_v"):
            ranks = getattr(self, argument)
            for rank in ranks if isinstance(ranks, Sequence) else [ranks]:
                if rank is not None and not _is_rank(rank):
                    raise ArgumentError(
                        f"{argument} must be a number of at least 1 or a share (0 < float <= 1), got {rank!r}"
                    )
        for argument, least in (("group_size", 1), ("sink_size", 0)):
            if getattr(self, argument) < least:
                raise ArgumentError(f"{argument} must be at least {least}, got {getattr(self, argument)}")
        if self.start_layer < 0 or self.end_layer < -1:
            raise ArgumentError(
                "start_layer must be at least 0 and end_layer at least -1, "
                f"got start_layer={self.start_layer}, end_layer={self.end_layer}"
            )

    def acts_on(self, site: Site) -> bool:
        if not super().acts_on(site):
            return False
        if self.groups is not None:
            return any(site.index in group for group in self.groups)
        return self.start_layer <= site.index and (self.end_layer == -1 or site.index <= self.end_layer)

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        super().prepare(model, sites)
        acting = [site for site in sites if self.acts_on(site)]
        for site in acting:
            site.need_rotary(self.name)
        groups = self._grouped(acting)
        if self.layer_merge_impl == "slerp" and any(len(group) != 2 for group in groups):
            raise ArgumentError(f"layer_merge_impl='slerp' merges pairs of layers, got groups {groups}")
        for argument in ("rank_k", "rank_v"):
            ranks = getattr(self, argument)
            if isinstance(ranks, Sequence) and len(ranks) != len(groups):
                raise ArgumentError(f"{argument} has {len(ranks)} ranks, expected one for each of {len(groups)} groups")

    def _grouped(self, sites: list[Site]) -> list[list[int]]:
        """The groups of layers, as indices, among the sites it acts on."""
        if self.groups is None:
            return group_layers([site.index for site in sites], self.group_size)
        groups = [sorted(group) for group in self.groups]
        inside = sorted(index for group in groups for index in group)
        if inside != sorted(site.index for site in sites):
            raise ArgumentError(f"groups must name layers with full context once each, got {groups}")
        return groups

    def new_layers(self, sites: list[Site]) -> list[TrackedLayer]:
        layers: dict[int, TrackedLayer] = {}
        for g, group in enumerate(self._grouped(sites)):
            shared = self._shared(g)
            layers |= {index: GroupedLayer(shared) for index in group}
        return [layers[site.layer] for site in sites]

    def _shared(self, group: int) -> LayerGroup:
        if self.layer_merge_impl == "slerp":
            return MergedPair(self.merge_key, self.merge_value, self.slerp_t, self.slerp_gamma)
        rank_k, rank_v = (
            self.rank if self.rank is not None else ranks[group] if isinstance(ranks, Sequence) else ranks
            for ranks in (self.rank_k, self.rank_v)
        )
        return SharedBasis(
            rank_k if self.merge_key else None,
            rank_v if self.merge_value else None,
            self.sink_size,
            self.store,
            self.randomized,
        )

    def qkv(self, call: Call) -> None:
        if isinstance(call.layer, GroupedLayer):
            assert call.key_positions is not None
            rotate_keys(call, call.key_positions, same_everywhere=True)

    def after(self, call: Call) -> None:
        if isinstance(call.layer, GroupedLayer) and call.is_prefill:
            call.layer.compress(call.query.shape[2])


def _is_rank(rank: object) -> bool:
    if isinstance(rank, float):
        return 0 < rank <= 1
    return isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
