"""The transformers adapter: find the attention modules, hand them regard's attention function and masks.

Models of transformers ≥ 5 look their attention up in `AttentionInterface` and their masks in `AttentionMaskInterface`.
regard registers one function under its name in each. The mask function returns a `Mask` in place of a tensor, so no
N×M tensor is built; the attention function passes the call to the session that `regard.apply` opened for the module.
"""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard import masks
from regard.errors import ArgumentError, Unsupported, require
from regard.masks import Mask
from regard.sites.site import Rotary, Site, is_rotate_half

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


def find_sites(model: nn.Module) -> list[Site]:
    """The model's attention sites, in layer order.

    Raises:
        Unsupported: an attention module does not use transformers' `AttentionInterface`, or there is none.
    """
    found, strangers = [], []
    for name, module in model.named_modules():
        if _uses_interface(module):
            found.append((name, module))
        elif type(module).__name__.endswith("Attention") and not _contains_interface_user(module):
            strangers.append(f"{name} ({type(module).__name__})")
    if strangers:
        raise Unsupported(f"attention modules that do not use transformers' AttentionInterface: {', '.join(strangers)}")
    if not found:
        raise Unsupported(f"no attention module found in {type(model).__name__}")
    sites = [_site(model, name, module) for name, module in found]
    indices = [site.index for site in sites]
    if len(set(indices)) != len(indices):
        raise Unsupported(
            f"{type(model).__name__} has several attention modules per layer (an encoder, or cross-attention); "
            "only decoder-only language models are supported so far"
        )
    return sorted(sites, key=lambda site: site.index)


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _contains_interface_user(module: nn.Module) -> bool:
    return any(_uses_interface(child) for child in module.children())


def _site(model: nn.Module, name: str, module: nn.Module) -> Site:
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise Unsupported(f"{name} ({type(module).__name__}) has no layer_idx, so regard cannot find its cache layer")
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[index] if layer_types else None
    window = getattr(config, "sliding_window", None)
    if layer_type is not None and layer_type != "sliding_attention":
        window = None
    return Site(int(index), name, module, window, _rotary(model, name, module, layer_type))


def _rotary(model: nn.Module, name: str, module: nn.Module, layer_type: str | None) -> Rotary | None:
    """The rotary module nearest above the site, if it is one regard can move positions with."""
    if not is_rotate_half(getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)):
        return None
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        parent = model.get_submodule(".".join(parts[:depth]))
        for child_name, child in parent.named_children():
            if child_name.startswith("rotary_emb") and hasattr(child, "forward"):
                takes_type = "layer_type" in inspect.signature(child.forward).parameters
                rope_type = getattr(child, "rope_type", "default")
                kinds = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
                if kinds & _DYNAMIC_ROPE:
                    return None
                return Rotary(child, layer_type if takes_type else None)
    return None


def decoder(model: nn.Module) -> nn.Module:
    """The module whose forward makes and fills the cache: the decoder inside a model with a head."""
    get = getattr(model, "get_decoder", None)
    inner = get() if callable(get) else None
    return inner if isinstance(inner, nn.Module) else model


def switch(sites: list[Site], model: nn.Module) -> list[tuple[Any, str | None]]:
    """Point every config the sites and the model read at regard's functions; returns what to restore."""
    configs: dict[int, Any] = {id(c): c for c in [decoder(model).config, *(site.module.config for site in sites)]}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
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
