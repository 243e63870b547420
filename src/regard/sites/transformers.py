"""The transformers adapter: find the attention modules, hand them regard's attention function and masks.

Models of transformers ≥ 5 look their attention up in `AttentionInterface` and their masks in `AttentionMaskInterface`.
regard registers one function under its name in each. The mask function returns a `Mask` in place of a tensor, so no
N×M tensor is built; the attention function passes the call to the session that `regard.apply` opened for the module.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard import masks
from regard.errors import ArgumentError, Unsupported, require
from regard.masks import Mask
from regard.sites.site import Kind, Rotary, Site, is_rotate_half

NAME = "regard"

#: rotary variants whose frequencies change with the length seen, so positions cannot be re-assigned
_DYNAMIC_ROPE = {"dynamic", "longrope"}

#: attention module -> the function its active session computes attention with
_ACTIVE: "WeakKeyDictionary[nn.Module, Callable[..., tuple[Tensor, Tensor | None]]]" = WeakKeyDictionary()


def register() -> None:
    """Register regard's attention and mask functions with transformers (idempotent)."""
    transformers = require("transformers", "work on transformers models")
    transformers.AttentionInterface.register(NAME, _attention)
    transformers.AttentionMaskInterface.register(NAME, _mask)


def route(module: nn.Module, function: Callable[..., tuple[Tensor, Tensor | None]] | None) -> None:
    """Send the module's attention to `function`; None ends it."""
    if function is None:
        _ACTIVE.pop(module, None)
    else:
        _ACTIVE[module] = function


def is_routed(module: nn.Module) -> bool:
    return module in _ACTIVE


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
    function = _ACTIVE.get(module)
    if function is None:
        raise Unsupported(f"{type(module).__name__} uses attention 'regard' outside `with regard.apply(model, ...)`")
    return function(module, query, key, value, attention_mask, **kwargs)


# --- sites ----------------------------------------------------------------------------------------------------------


def uses_interface(module: nn.Module) -> bool:
    """Whether the module looks its attention up in `AttentionInterface`."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def make_site(model: nn.Module, name: str, module: nn.Module, index: int) -> Site:
    """The site of a module that uses the interface."""
    layer = getattr(module, "layer_idx", None)
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[layer] if layer_types and layer is not None else None
    window = getattr(config, "sliding_window", None)
    if layer_type is not None and layer_type != "sliding_attention":
        window = None
    return Site(
        index,
        index if layer is None else int(layer),
        name,
        module,
        kind=_kind(name, module),
        window=window,
        rotary=_rotary(model, name, module, layer_type),
        stack=_stack(model, name),
    )


def _kind(name: str, module: nn.Module) -> Kind:
    """Names tell cross-attention, and `is_causal`, which transformers itself goes by, tells the others apart."""
    own = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if any(word in own for word in ("cross", "encoder_attn", "encdec", "enc_dec")):
        return "cross"
    return "decoder" if getattr(module, "is_causal", True) else "encoder"


def _stack(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest model of transformers around a module: it makes masks, and in a decoder fills the cache."""
    base = require("transformers", "work on transformers models").PreTrainedModel
    return next((above for above in _above(model, name) if isinstance(above, base)), None)


def _above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around a named one, innermost first."""
    parts = name.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:depth]))


def _rotary(model: nn.Module, name: str, module: nn.Module, layer_type: str | None) -> Rotary | None:
    """The rotary module nearest above the site, if it is one regard can move positions with."""
    if not is_rotate_half(getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)):
        return None
    for parent in (module, *_above(model, name)):
        for child_name, child in parent.named_children():
            if child_name.startswith("rotary_emb") and hasattr(child, "forward"):
                takes_type = "layer_type" in inspect.signature(child.forward).parameters
                rope_type = getattr(child, "rope_type", "default")
                kinds = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
                if kinds & _DYNAMIC_ROPE:
                    return None
                return Rotary(child, layer_type if takes_type else None)
    return None


def switch(sites: list[Site]) -> list[tuple[Any, str | None]]:
    """Point every config the sites and their stacks read at regard's functions; returns what to restore."""
    read: list[Any] = [module.config for site in sites for module in (site.module, site.stack) if module is not None]
    before = [(config, config._attn_implementation_internal) for config in {id(c): c for c in read}.values()]
    for config, _ in before:
        config._attn_implementation_internal = NAME
    return before


def restore(before: list[tuple[Any, str | None]]) -> None:
    for config, implementation in before:
        config._attn_implementation_internal = implementation


# --- masks ----------------------------------------------------------------------------------------------------------


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Mask:
    """transformers' mask function as a `Mask` over rows 0..q_length-1 and key slots 0..kv_length-1."""
    mask = _structure(mask_function, int(q_offset), int(kv_offset))
    if attention_mask is not None:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if valid.shape[1] < kv_length:
            raise ArgumentError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, expected {kv_offset + kv_length} "
                "(all tokens seen so far and the new ones)"
            )
        if not bool(valid.all()):
            mask = mask & masks.padding(valid)
    return mask


def _structure(function: Callable | None, q_offset: int, kv_offset: int) -> Mask:
    """Recognise transformers' mask functions by the closures they are made of; keep the rest as functions."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return masks.causal().shift(q_offset - kv_offset)
    if function is masking_utils.bidirectional_mask_function:
        return masks.full()
    assert function is not None
    maker = getattr(function, "__qualname__", "").partition(".")[0]
    captured = inspect.getclosurevars(function).nonlocals
    if maker in ("and_masks", "or_masks"):
        first, *rest = (_structure(part, q_offset, kv_offset) for part in captured["mask_functions"])
        for part in rest:
            first = first & part if maker == "and_masks" else first | part
        return first
    if maker == "sliding_window_overlay":
        # as transformers means it: k > q - window; the future is the causal mask's business
        return masks.band(None, captured["sliding_window"] - 1).shift(q_offset - kv_offset)
    return masks.from_function(lambda b, h, q, k: function(b, h, q + q_offset, k + kv_offset))


def as_mask(attention_mask: Any, n: int, m: int, causal: bool) -> tuple[Mask | None, Tensor | None]:
    """What a model passed as attention_mask, as a (mask, bias) pair: a `Mask`, None, or the user's own 4-D tensor."""
    if isinstance(attention_mask, Mask):
        return attention_mask, None
    if attention_mask is None:
        return (masks.causal().shift(m - n) if causal else None), None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        given = attention_mask[..., -n:, :m] if attention_mask.shape[-2] != 1 else attention_mask[..., :m]
        if given.dtype == torch.bool:
            return masks.from_dense(given.expand(-1, -1, n, m)), None
        # additive: the lowest value means "masked"; keep the rest as a bias
        return None, given
    raise Unsupported(f"attention_mask of type {type(attention_mask).__name__} is not understood")
