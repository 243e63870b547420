"""One attention computation: the stages of the methods that act on it, in order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.attention import attention
from regard.attention.intercept import intercepted
from regard.errors import ArgumentError, Unsupported
from regard.sites.call import Call
from regard.sites.method import Method

STAGES = ("qkv", "mask", "attend", "scores", "weights", "heads", "after")


class Stages:
    """The methods of one site by the stages that they override.

    Raises:
        ArgumentError: a method computes attention itself where another wants its scores or weights.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self._at = {stage: [m for m in methods if m.overrides(stage)] for stage in STAGES}
        self._materialise = bool(self._at["scores"] or self._at["weights"])
        self._needs_lse = any(method.needs_lse for method in self._at["after"])
        if self._materialise and self._at["attend"]:
            raise ArgumentError(f"{self._at['attend'][0].name} computes attention itself; it has no scores or weights")

    def run(self, call: Call, *, weights: bool = False, dropped: bool = False) -> Tensor:
        """The output (B, H, N, Dv), left in ``call.out`` too.

        Args:
            weights: leave the weights in ``call.weights``.
            dropped: keys were dropped, so that slots and positions differ.
        """
        for method in self._at["qkv"]:
            method.qkv(call)
        if self._at["mask"] and dropped:
            raise Unsupported(
                f"{self._at['mask'][0].name} counts keys by position, but the cache has dropped some of them "
                f"({call.key.shape[2]} of {call.layer.seen} are left); apply one or the other"
            )
        for method in self._at["mask"]:
            restriction = method.mask(call)
            if restriction is not None:
                call.mask = restriction if call.mask is None else call.mask & restriction
        with intercepted(None):
            out = self._attend(call, weights)
        if call.probe is not None:
            out, call.extra["probe"] = out.split([call.value.shape[-1], call.probe.shape[-1]], dim=-1)
        for method in self._at["heads"]:
            out = method.heads(call, out)
        call.out = out
        for method in self._at["after"]:
            method.after(call)
        return out

    def _attend(self, call: Call, weights: bool) -> Tensor:
        if self._at["attend"]:
            return self._at["attend"][0].attend(call)
        if self._materialise or weights:
            return self._materialised(call)
        inputs = call.query, call.key, call.payload
        if not self._needs_lse:
            return attention(*inputs, mask=call.mask, bias=call.bias, scale=call.scale)
        out, call.lse = attention(*inputs, mask=call.mask, bias=call.bias, scale=call.scale, return_lse=True)
        return out

    def _materialised(self, call: Call) -> Tensor:
        """Attention with its scores and weights as tensors (B, H, N, M), for methods that read or change them."""
        key, payload = (t.repeat_interleave(call.num_groups, dim=1) for t in (call.key, call.payload))
        scores = call.query @ key.transpose(-1, -2) * call.scale
        if call.bias is not None:
            scores = scores + call.bias
        for method in self._at["scores"]:
            scores = method.scores(call, scores)
        if call.mask is not None:
            n, m = scores.shape[-2:]
            allowed = call.mask.dense(n, m).to(scores.device)
            scores = scores.masked_fill(~allowed, float("-inf"))
        # nan: rows that see nothing
        weights = torch.softmax(scores.float(), dim=-1).nan_to_num(0.0).to(payload.dtype)
        for method in self._at["weights"]:
            weights = method.weights(call, weights)
        call.weights = weights
        return weights @ payload
