"""`regard.apply`: put methods to work on a model, and take every trace of them away again."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, Unsupported
from regard.masks import Mask
from regard.sites import transformers as adapter
from regard.sites.call import Call, Step
from regard.sites.method import Method
from regard.sites.site import Site

_ATTENTION_STAGES = ("qkv", "mask", "attend", "scores", "weights", "heads", "after")
#: only one method may decide these
_EXCLUSIVE = ("attend", "cache")
#: what attention modules call the cache
_CACHE_ARGUMENTS = ("past_key_values", "layer_past")
#: keyword arguments of transformers' attention call that change the result; refused unless they are off
_REFUSED = ("softcap", "s_aux", "position_bias", "cache")


@contextmanager
def apply(model: nn.Module, methods: Method | Sequence[Method]) -> Iterator[nn.Module]:
    """Run `model` with `methods` inside the ``with`` block; afterwards the model is as it was, bit for bit.

        with regard.apply(model, [PowerAttention(), H2O()]):
            model.generate(...)

    Args:
        model: a transformers language model whose attention uses `AttentionInterface`.
        methods: one method or several, composed in order; an empty list changes nothing at all.

    Raises:
        ArgumentError: something that is not a method, a model that is already under `apply`, two methods that both
            replace the attention or both bring a cache.
        Unsupported: the model has attention that cannot be adapted.
    """
    methods = [methods] if isinstance(methods, Method) else list(methods)
    for method in methods:
        if not isinstance(method, Method):
            raise ArgumentError(f"methods must be regard methods, got {type(method).__name__}: {method!r}")
    for stage in _EXCLUSIVE:
        rivals = [method.name for method in methods if method.overrides(stage)]
        if len(rivals) > 1:
            raise ArgumentError(f"only one method may provide {stage!r}, got {' and '.join(rivals)}")
    if not methods:
        yield model
        return
    with _Session(model, methods):
        yield model


class _Session:
    """Hooks, routing and the cache of one `apply`."""

    def __init__(self, model: nn.Module, methods: list[Method]) -> None:
        self.model = model
        self.methods = methods
        self.sites = adapter.find_sites(model)
        self.step = Step()
        self.steps: dict[int, Step] = {}
        self.layers: dict[int, Any] = {}
        self.exits = ExitStack()

    def __enter__(self) -> "_Session":
        adapter.register()
        if any(adapter.is_routed(site.module) for site in self.sites):
            raise ArgumentError("the model is already under regard.apply; pass all methods in one list instead")
        for method in self.methods:
            method.prepare(self.model, self.sites)
        with ExitStack() as exits:  # undone on the spot if anything below fails
            self._install(exits)
            self.exits = exits.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.exits.close()

    def _install(self, exits: ExitStack) -> None:
        if self._at("cache", *_ATTENTION_STAGES):
            before = adapter.switch(self.sites, self.model)
            exits.callback(adapter.restore, before)
            for site in self.sites:
                adapter.route(site.module, self._attention_of(site))
                exits.callback(adapter.route, site.module, None)
        decoder = adapter.decoder(self.model)
        self._hook(exits, decoder.register_forward_pre_hook(self._begin(decoder), with_kwargs=True))
        for site in self.sites:
            self._hook(exits, site.module.register_forward_pre_hook(self._before(site), with_kwargs=True))
            outputs = [m for m in self._at("output") if m.acts_on(site)]
            if outputs:
                self._hook(exits, site.module.register_forward_hook(self._change_output(site, outputs)))
        if self._at("logits"):
            self._hook(exits, self.model.register_forward_hook(self._change_logits))

    @staticmethod
    def _hook(exits: ExitStack, handle: Any) -> None:
        exits.callback(handle.remove)

    def _at(self, *stages: str, site: Site | None = None) -> list[Method]:
        """The methods that override one of the stages (and act on the site)."""
        return [
            method
            for method in self.methods
            if any(method.overrides(stage) for stage in stages) and (site is None or method.acts_on(site))
        ]

    # --- before and after the attention module ------------------------------------------------------------------

    def _begin(self, decoder: nn.Module):
        """Pre-hook of the decoder: what its call says about positions and padding, and the policy's cache."""
        names = _parameter_names(decoder)

        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = _Given(names, args, kwargs)
            if self._at("cache"):
                self._provide_cache(module.config, given)
            tokens = given.get("input_ids")
            tokens = given.get("inputs_embeds") if tokens is None else tokens
            n, device = tokens.shape[1], tokens.device
            positions = given.get("position_ids")
            if positions is None:
                cache = given.get("past_key_values")
                seen = 0 if cache is None else cache.get_seq_length()
                positions = torch.arange(seen, seen + n, device=device)[None]
            padding = given.get("attention_mask")
            valid = None
            if isinstance(padding, Tensor) and padding.ndim == 2 and not bool(padding.all()):
                valid = padding[:, -n:].bool()
            self.step = Step(positions=positions, valid=valid)
            return given.args, given.kwargs

        return hook

    def _before(self, site: Site):
        """Pre-hook of a site: stage `hidden`, and the step for the cache layer and the call."""
        methods = self._at("hidden", site=site)
        names = _parameter_names(site.module)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = _Given(names, args, kwargs)
            for method in methods:
                given.set("hidden_states", method.hidden(site, given.get("hidden_states")))
            step = replace(self.step)
            angles = given.get("position_embeddings")
            if angles is not None:
                step.cos, step.sin = angles[0][:, None], angles[1][:, None]
            cache = next((c for c in map(given.get, _CACHE_ARGUMENTS) if c is not None), None)
            layer = cache.layers[site.index] if cache is not None and site.index < len(cache.layers) else None
            begin = getattr(layer, "begin", None)
            if begin is not None:
                begin(step)
            self.steps[site.index], self.layers[site.index] = step, layer
            return given.args, given.kwargs

        return hook

    @staticmethod
    def _change_output(site: Site, methods: list[Method]):
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            for method in methods:
                hidden = method.output(site, hidden)
            return (hidden, *rest) if isinstance(output, tuple) else hidden

        return hook

    def _change_logits(self, module: nn.Module, args: tuple, output: Any) -> Any:
        for method in self._at("logits"):
            output.logits = method.logits(output.logits)
        return output

    # --- the cache ----------------------------------------------------------------------------------------------

    def _provide_cache(self, config: Any, given: "_Given") -> None:
        """Give a forward that would start a cache the policy's layers; one that continues a cache passes through."""
        from transformers import DynamicCache

        (method,) = self._at("cache")
        cache = given.get("past_key_values")
        if cache is None:
            use_cache = given.get("use_cache")
            if not (config.use_cache if use_cache is None else use_cache):
                return
            cache = DynamicCache(config=config)
            given.set("past_key_values", cache)
        if getattr(cache, "regard_method", None) == method:  # equal, not the same: caches are deep-copied
            return
        if cache.get_seq_length() > 0:
            raise ArgumentError(
                f"past_key_values was filled without {method.name}; start with an empty cache inside regard.apply"
            )
        if not isinstance(cache, DynamicCache):
            raise Unsupported(f"{method.name} replaces the layers of a DynamicCache, got {type(cache).__name__}")
        if cache.offloading:
            raise Unsupported(f"{method.name} does not support a cache that offloads its layers")
        layers = cache.layers or DynamicCache(config=config).layers
        cache.layers = method.cache(list(layers), self.sites)
        cache.layer_class_to_replicate = None
        cache.regard_method = method  # type: ignore[attr-defined]

    # --- attention ----------------------------------------------------------------------------------------------

    def _attention_of(self, site: Site):
        """The attention function of one site, with the stages of the methods that act there."""
        stages = {stage: self._at(stage, site=site) for stage in _ATTENTION_STAGES}
        materialise = bool(stages["scores"] or stages["weights"])
        needs_lse = any(method.needs_lse for method in stages["after"])
        if materialise and stages["attend"]:
            raise ArgumentError(f"{stages['attend'][0].name} computes attention itself; it has no scores or weights")

        def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
            for argument in _REFUSED:
                if kwargs.get(argument) is not None:
                    raise Unsupported(
                        f"{site.name} passes {argument!r} to attention, which regard does not compute yet"
                    )
            if dropout:
                raise Unsupported("attention dropout inside regard.apply; call model.eval() or set it to 0")
            n, m = query.shape[2], key.shape[2]
            layer: Any = self.layers.get(site.index)
            slots = getattr(layer, "slots", None)
            mask: Mask | None
            bias: Tensor | None
            if slots is not None and layer.seen != m:  # keys were dropped: slot and position differ
                if isinstance(attention_mask, Tensor):
                    raise Unsupported(
                        f"a four-dimensional attention_mask counts keys by position, but the cache has dropped some "
                        f"of them ({m} of {layer.seen} are left); pass a two-dimensional one"
                    )
                mask, bias = masks.causal().shift(m - n), None
                if slots.valid is not None:
                    mask = mask & masks.padding(_per_query_head(slots.valid, query.shape[1]))
            else:
                causal = kwargs.get("is_causal")
                causal = getattr(module, "is_causal", True) if causal is None else causal
                mask, bias = adapter.as_mask(attention_mask, n, m, causal)
            call = Call(
                site, query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling,
                self.steps[site.index], bias=bias, layer=layer,
                key_positions=None if slots is None else slots.positions,
            )  # fmt: skip
            for method in stages["qkv"]:
                method.qkv(call)
            if stages["mask"] and slots is not None and layer.seen != m:
                raise Unsupported(
                    f"{stages['mask'][0].name} counts keys by position, but the cache has dropped some of them "
                    f"({m} of {layer.seen} are left); apply one or the other"
                )
            for method in stages["mask"]:
                restriction = method.mask(call)
                if restriction is not None:
                    call.mask = restriction if call.mask is None else call.mask & restriction
            weights = None
            if stages["attend"]:
                out = stages["attend"][0].attend(call)
            elif materialise or kwargs.get("output_attentions"):
                out, weights = _materialised(call, stages["scores"], stages["weights"])
                call.weights = weights
            else:
                inputs = call.query, call.key, call.payload
                if needs_lse:
                    out, call.lse = attention(
                        *inputs, mask=call.mask, bias=call.bias, scale=call.scale, return_lse=True
                    )
                else:
                    out = attention(*inputs, mask=call.mask, bias=call.bias, scale=call.scale)
            if call.probe is not None:
                out, call.extra["probe"] = out.split([call.value.shape[-1], call.probe.shape[-1]], dim=-1)
            for method in stages["heads"]:
                out = method.heads(call, out)
            call.out = out
            for method in stages["after"]:
                method.after(call)
            return out.transpose(1, 2).contiguous(), weights

        return forward


def _parameter_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


class _Given:
    """The arguments of a forward by name, however they were passed; `set` keeps the way they were passed."""

    def __init__(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> None:
        self._names, self.args, self.kwargs = names, args, kwargs

    def get(self, name: str) -> Any:
        place = self._place(name)
        return self.kwargs.get(name) if place is None else self.args[place]

    def set(self, name: str, value: Any) -> None:
        place = self._place(name)
        if place is None:
            self.kwargs = {**self.kwargs, name: value}
        else:
            self.args = (*self.args[:place], value, *self.args[place + 1 :])

    def _place(self, name: str) -> int | None:
        """Index among the positional arguments, or None where the argument is not one of them."""
        if name in self._names[: len(self.args)]:
            return self._names.index(name)
        return None


def _materialised(call: Call, on_scores: list[Method], on_weights: list[Method]) -> tuple[Tensor, Tensor]:
    """Attention with its scores and weights as tensors (B, H, N, M), for methods that read or change them."""
    key, payload = (t.repeat_interleave(call.num_groups, dim=1) for t in (call.key, call.payload))
    scores = call.query @ key.transpose(-1, -2) * call.scale
    if call.bias is not None:
        scores = scores + call.bias
    for method in on_scores:
        scores = method.scores(call, scores)
    if call.mask is not None:
        n, m = scores.shape[-2:]
        allowed = call.mask.dense(n, m).to(scores.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.softmax(scores.float(), dim=-1).nan_to_num(0.0).to(payload.dtype)  # nan: rows that see nothing
    for method in on_weights:
        weights = method.weights(call, weights)
    return weights @ payload, weights


def _per_query_head(valid: Tensor, num_heads: int) -> Tensor:
    """(B, Hk or 1, M) flags of key-value heads as flags of the query heads that share them."""
    return valid if valid.shape[1] == 1 else valid.repeat_interleave(num_heads // valid.shape[1], dim=1)
