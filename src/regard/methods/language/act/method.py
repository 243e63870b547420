"""ACT on a model, without the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import Partial, attention, received
from regard.cache import HeavyHitterLayer, TrackedLayer
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.act.calibration import (
    Threshold,
    above,
    at_or_after,
    check_beta,
    check_heads,
    check_threshold,
    without_first,
)
from regard.methods.language.policy import CachePolicy
from regard.sites import Call, Site


@dataclass(kw_only=True)
class ACT(CachePolicy):
    """Calibrate the attention of chosen heads while the model reads; see `calibrate_attention` for the equations.

    Exact and without N×N weights: A' is linear in attention to S' and to the rest, so with both as `Partial`s the
    output is ``β p o_S + (1 - β p) o_R``, p = sigmoid(lse_S - lse_R), and the column sums come from the dense pass's
    lse. Costs the dense pass and three more over the chosen heads.

    While generating, the column sums go on in the cache layers, and each new row is calibrated by the sums up to
    itself. So a text in pieces is not quite the text in one piece: a row knows only of the weight that came before the
    end of its piece. A column average counts every later query of the text, also where another method hides the key.

    Args:
        only_heads: by layer, the heads to calibrate, as `search_heads` finds them; None takes every head of `layers`,
            an empty mapping none.
        beta: share of their weight that sinks keep.
        threshold: what makes a sink: a mean weight, or ``"5/N"`` for five times the uniform weight (the paper's form).
        protect_first: leave each head's first sink alone.
    """

    name: ClassVar[str] = "act"
    only_heads: Mapping[int, Sequence[int]] | None = None
    beta: float = 0.4
    threshold: Threshold = 0.1
    protect_first: bool = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_threshold(self.threshold)

    def acts_on(self, site: Site) -> bool:
        return super().acts_on(site) and (self.only_heads is None or bool(self.only_heads.get(site.index)))

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        by_index = {site.index: site for site in sites}
        for layer, heads in (self.only_heads or {}).items():
            if layer not in by_index:
                raise ArgumentError(f"only_heads: the model has layers 0..{len(sites) - 1}, got {layer}")
            if heads and by_index[layer].window is not None:
                raise Unsupported(f"{self.name} needs full context, and layer {layer} slides a window of its own")
            check_heads(heads, num_heads(by_index[layer]), f"only_heads of layer {layer}")
        if self.only_heads is None or any(self.only_heads.values()):
            super().prepare(model, sites)

    def new_layers(self, sites: list[Site]) -> list[TrackedLayer]:
        return [HeavyHitterLayer(0, 1, normalise=True) for _ in sites]  # never told to evict: it only counts

    def attend(self, call: Call) -> Tensor:
        out, lse = attention(
            call.query, call.key, call.payload, mask=call.mask, bias=call.bias, scale=call.scale, return_lse=True
        )
        chosen = _Chosen(call, None if self.only_heads is None else self.only_heads[call.site.index])
        average, lengths = chosen.average(lse)
        sinks = above(average, self.threshold, lengths)
        if self.protect_first:
            sinks = without_first(sinks)
        if not sinks.any():
            return out
        on, rest = (chosen.attend(keys) for keys in (sinks, ~sinks))
        share = self.beta * (on.lse - rest.lse).sigmoid()
        share = share.masked_fill(rest.lse == -torch.inf, 1.0)[..., None]  # all of the row lies on sinks: it stays
        calibrated = (share * on.out + (1 - share) * rest.out).to(out.dtype)
        return out.index_copy(1, chosen.index, calibrated)


class _Chosen:
    """The part of a call that belongs to the heads to calibrate."""

    def __init__(self, call: Call, heads: Sequence[int] | None) -> None:
        self.call = call
        everything = range(call.query.shape[1])
        self.index = torch.tensor(list(everything if heads is None else heads), device=call.query.device)
        of_keys = self.index // call.num_groups
        self.query, self.key, self.value = call.query[:, self.index], call.key[:, of_keys], call.payload[:, of_keys]
        bias, mask = call.bias, call.mask
        self.bias = bias if bias is None or bias.shape[1] == 1 else bias[:, self.index]
        if mask is not None and mask.heads is not None:  # rows of a table by head
            n, m = call.query.shape[2], call.key.shape[2]
            table = mask.dense(n, m, call.query.device)
            mask = masks.from_dense(table[(None,) * (4 - table.dim())][:, self.index])
        self.mask = mask

    def average(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Column averages (B, h, M) so far, and the number of real tokens (B or 1,)."""
        call, valid, n = self.call, self.call.step.valid, self.query.shape[2]
        lse = lse.detach()[:, self.index]
        if valid is not None:  # exp(s - inf) = 0: what padding looks at does not count
            lse = lse.masked_fill(~valid[:, None], torch.inf)
        sums = received(self.query.detach(), self.key.detach(), lse, mask=self.mask, bias=self.bias, scale=call.scale)
        if isinstance(call.layer, HeavyHitterLayer):
            call.layer.observe(sums, n)
            assert call.layer.scores is not None
            assert call.layer.observations is not None
            sums, observers = call.layer.scores, call.layer.observations
        else:
            real = torch.ones(1, n, dtype=torch.bool, device=sums.device) if valid is None else valid
            observers = at_or_after(real)[:, None]
        return sums / observers.clamp_min(1), observers[:, 0, 0]

    def attend(self, keys: Tensor) -> Partial:
        """Attention to some of the keys (B, h, M) only."""
        mask = masks.padding(keys) if self.mask is None else self.mask & masks.padding(keys)
        scale = self.call.scale
        return attention(self.query, self.key, self.value, mask=mask, bias=self.bias, scale=scale, return_lse=True)


def num_heads(site: Site) -> int:
    """Query heads of a site."""
    return int(site.module.config.num_attention_heads)  # type: ignore[union-attr,arg-type]
