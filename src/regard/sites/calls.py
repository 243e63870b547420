"""The adapter for everything else: modules that compute attention by one call to a known function.

`F.scaled_dot_product_attention` is what timm, torch and most code of today call, `regard.attention` what regard's own
mechanisms call. While a session is open, the forward of each such module runs with both intercepted. Which modules
these are is known for timm (``fused_attn``), torch and regard; others are named with `register`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regard import masks
from regard.attention.intercept import Attend, intercepted
from regard.errors import ArgumentError, Unsupported
from regard.masks import Mask
from regard.mechanisms.base import Mechanism
from regard.mechanisms.grid.base import GridMechanism
from regard.sites.site import Kind, Site

_REGISTERED: dict[type[nn.Module], Kind] = {nn.MultiheadAttention: "encoder"}


def register(module_type: type[nn.Module], kind: Kind = "encoder") -> None:
    """Make modules of a class sites: for `regard.apply`, `regard.record` and all that builds on them.

    Their forward must compute attention by one call to `torch.nn.functional.scaled_dot_product_attention` or
    `regard.attention`, with queries (B, H, N, D).

        regard.sites.register(MyAttention, kind="decoder")

    Args:
        kind: "encoder" (noncausal self-attention), "decoder" (causal) or "cross".

    Raises:
        ArgumentError: not a class of modules, or no such kind.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError(f"module_type: expected a class of modules, got {module_type!r}")
    if kind not in ("encoder", "decoder", "cross"):
        raise ArgumentError(f"kind: expected 'encoder', 'decoder' or 'cross', got {kind!r}")
    _REGISTERED[module_type] = kind


def is_call_site(module: nn.Module) -> bool:
    """Whether the module is known to compute attention by one call."""
    if isinstance(module, Mechanism | GridMechanism):
        return not any(
            isinstance(child, Mechanism | GridMechanism) for child in module.modules() if child is not module
        )
    return isinstance(module, tuple(_REGISTERED)) or hasattr(module, "fused_attn")


def make_site(name: str, module: nn.Module, index: int) -> Site:
    """The site of such a module."""
    kind = next((kind for cls, kind in reversed(_REGISTERED.items()) if isinstance(module, cls)), None)
    if kind is None:
        kind = "decoder" if getattr(module, "causal", False) else "encoder"
    return Site(index, index, name, module, kind=kind)


@contextmanager
def routed(module: nn.Module, attend: Attend) -> Iterator[None]:
    """Within the block, the attention that this module's forward computes is computed by ``attend``."""
    original, own = module.forward, "forward" in vars(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _SDPA(attend) as mode, intercepted(mode.attend):
            return original(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            module.forward = original  # type: ignore[method-assign]
        else:
            del module.forward


class _SDPA(TorchFunctionMode):
    """Sends calls of torch's function elsewhere."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend, self._busy = attend, False

    def attend(self, *arguments: Any) -> Tensor:
        """The replacement, which may itself call what is intercepted."""
        self._busy = True
        try:
            return self._attend(*arguments)
        finally:
            self._busy = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not self._busy:
            return self._call(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # torch's own: no mode is active inside of it
            with patch.object(F, "scaled_dot_product_attention", self._call):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise Unsupported("attention dropout inside regard.apply; call model.eval() or set it to 0")
        if query.ndim != 4:
            raise Unsupported(f"attention on {query.ndim} dimensions inside regard.apply; expected (B, H, N, D)")
        mask: Mask | Tensor | None = masks.causal() if is_causal else None
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask, bias = attn_mask, None
        return self.attend(query, key, value, mask, bias, query.shape[-1] ** -0.5 if scale is None else scale)
