"""Masked heads (arXiv:2404.15574): take from chosen heads the choice of what to look at, and see what breaks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.sites import Call, Method, Site, apply

Mode = Literal["uniform_causal", "uniform_all", "zero_output"]


@dataclass(kw_only=True)
class MaskHeads(Method):
    """Blind some heads.

        with regard.apply(model, MaskHeads(targets=[(16, 19), (11, 15)])):
            model.generate(...)

    What the heads' values contribute stays, except with ``zero_output``:

    - ``uniform_causal``: the query is zero, so a head attends equally to all keys that the query may see;
    - ``uniform_all``: the logits are zero after masking, so it attends equally to all keys that the last query of the
      forward may see; in a prompt this shows later tokens to earlier ones, as the published eager code does. It is put
      in place of the head's output, where probes of the weights do not see it;
    - ``zero_output``: the head contributes nothing.

    Args:
        targets: pairs (layer, query head).
        mode: see above.
        decoding_only: leave prompts (forwards of several tokens) as they are, as the published experiments do.
    """

    name: ClassVar[str] = "mask-heads"
    targets: Sequence[tuple[int, int]] = ()
    mode: Mode = "uniform_causal"
    decoding_only: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ArgumentError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        self._by_layer: dict[int, list[int]] = {}
        for pair in self.targets:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(i, int) and i >= 0 for i in pair):
                raise ArgumentError(f"targets: expected pairs (layer, head) of indices, got {pair!r}")
            self._by_layer.setdefault(pair[0], []).append(pair[1])

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        known = {site.index: getattr(site.module.config, "num_attention_heads", None) for site in sites}
        for layer, head in self.targets:
            if layer not in known:
                raise ArgumentError(f"targets: the model has layers {min(known)}..{max(known)}, got {(layer, head)}")
            count = known[layer]
            if count is not None and head >= count:
                raise ArgumentError(f"targets: layer {layer} has heads 0..{count - 1}, got {(layer, head)}")

    def acts_on(self, site: Site) -> bool:
        return super().acts_on(site) and site.index in self._by_layer

    def qkv(self, call: Call) -> None:
        if self.mode != "uniform_causal" or not self._acts_in(call):
            return
        blind = self._blind(call)
        call.query = call.query.masked_fill(blind, 0.0)
        if call.bias is not None:  # a bias would still choose; but what it hides stays hidden
            hidden = call.bias <= torch.finfo(call.bias.dtype).min / 2
            call.bias = call.bias.masked_fill(blind & ~hidden, 0.0)

    def heads(self, call: Call, out: Tensor) -> Tensor:
        if self.mode == "uniform_causal" or not self._acts_in(call):
            return out
        if self.mode == "zero_output":
            return out.masked_fill(self._blind(call), 0.0)
        seen = _seen_by_last(call).to(call.value.dtype)
        mean = (call.value * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
        return torch.where(self._blind(call), mean.repeat_interleave(call.num_groups, dim=1), out)

    def _acts_in(self, call: Call) -> bool:
        return not (self.decoding_only and call.is_prefill)

    def _blind(self, call: Call) -> Tensor:
        """(1, H, 1, 1) flags."""
        blind = torch.zeros(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        blind[self._by_layer[call.site.index]] = True
        return blind[None, :, None, None]


def mask_heads(
    model: nn.Module, heads: Sequence[tuple[int, int]], mode: Mode = "uniform_causal"
) -> AbstractContextManager[nn.Module]:
    """`regard.apply` with `MaskHeads`: ``with mask_heads(model, [(16, 19)]): ...``."""
    return apply(model, MaskHeads(targets=heads, mode=mode))


def _seen_by_last(call: Call) -> Tensor:
    """(B or 1, 1, M, 1), the keys that the last query may see."""
    b, _, m, _ = call.key.shape
    device = call.key.device
    seen = torch.ones(1, 1, 1, m, dtype=torch.bool, device=device)
    if call.mask is not None:
        items = torch.arange(b, device=device)[:, None, None, None]
        zero, keys = torch.zeros_like(items), torch.arange(m, device=device)
        seen = call.mask(items, zero, zero + call.query.shape[2] - 1, keys)
    if call.bias is not None:
        seen = seen & (call.bias[:, :1, -1:] > torch.finfo(call.bias.dtype).min / 2)
    return seen.expand(-1, 1, 1, m).mT
