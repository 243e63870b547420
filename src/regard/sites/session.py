"""`regard.apply`: put methods to work on a model, and take every trace of them away again."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard import masks
from regard.attention.intercept import Attend
from regard.errors import ArgumentError, Unsupported
from regard.masks import Mask
from regard.sites import calls
from regard.sites import transformers as interface
from regard.sites.call import Call, Step
from regard.sites.find import find_sites
from regard.sites.method import Method
from regard.sites.site import Site
from regard.sites.stages import STAGES, Stages

#: only one method may decide these
_EXCLUSIVE = ("attend", "cache")
#: what attention modules call the cache
_CACHE_ARGUMENTS = ("past_key_values", "layer_past")
#: keyword arguments of transformers' attention call that change the result; refused unless they are off
_REFUSED = ("softcap", "s_aux", "cache")


@contextmanager
def apply(model: nn.Module, methods: Method | Sequence[Method]) -> Iterator[nn.Module]:
    """Run `model` with `methods` inside the ``with`` block; afterwards the model is as it was, bit for bit.

        with regard.apply(model, [PowerAttention(), H2O()]):
            model.generate(...)

    Args:
        model: of transformers (language, vision, speech, encoder-decoders), of timm, or any other whose attention
            modules are known to `regard.sites.register`.
        methods: one method or several, composed in order; an empty list changes nothing at all.

    Raises:
        ArgumentError: something that is not a method, a model that is already under `apply`, two methods that both
            replace the attention or both bring a cache.
        Unsupported: the model has attention that cannot be adapted, or none of the kind that a method is for.
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
        self.sites = find_sites(model)
        self.begun: dict[nn.Module | None, Step] = {}
        self.steps: dict[int, Step] = {}
        self.layers: dict[int, Any] = {}
        self.exits = ExitStack()

    def __enter__(self) -> "_Session":
        if any(interface.is_routed(site.module) for site in self.sites):
            raise ArgumentError("the model is already under regard.apply; pass all methods in one list instead")
        for method in self.methods:
            sites = self._sites_of(method)
            if not sites:
                kinds, there = " or ".join(sorted(method.kinds)), " and ".join(sorted({s.kind for s in self.sites}))
                raise Unsupported(f"{method.name} is for {kinds} attention, {type(self.model).__name__} has {there}")
            method.prepare(self.model, sites)
        with ExitStack() as exits:  # undone on the spot if anything below fails
            self._install(exits)
            self.exits = exits.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.exits.close()

    def _sites_of(self, method: Method) -> list[Site]:
        return [site for site in self.sites if site.kind in method.kinds]

    def _install(self, exits: ExitStack) -> None:
        if self._at("cache", *STAGES):
            self._route(exits)
        for stack in {site.stack: None for site in self.sites if site.stack is not None}:
            self._hook(exits, stack.register_forward_pre_hook(self._begin(stack), with_kwargs=True))
        for site in self.sites:
            self._hook(exits, site.module.register_forward_pre_hook(self._before(site), with_kwargs=True))
            outputs = [m for m in self._at("output") if m.acts_on(site)]
            if outputs:
                self._hook(exits, site.module.register_forward_hook(self._change_output(site, outputs)))
        if self._at("logits"):
            self._hook(exits, self.model.register_forward_hook(self._change_logits))

    def _route(self, exits: ExitStack) -> None:
        """Send the attention of every site through the stages."""
        through = [site for site in self.sites if interface.uses_interface(site.module)]
        if through:
            interface.register()
            exits.callback(interface.restore, interface.switch(through))
        for site in self.sites:
            stages = Stages([m for m in self._at(*STAGES) if m.acts_on(site)])
            if interface.uses_interface(site.module):
                interface.route(site.module, self._interface_function(site, stages))
                exits.callback(interface.route, site.module, None)
            elif self._at(*STAGES, site=site):
                exits.enter_context(calls.routed(site.module, self._call_function(site, stages)))

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

    def _begin(self, stack: nn.Module):
        """Pre-hook of a stack: what its call says about positions and padding, and the policy's cache."""
        names = _parameter_names(stack)
        caches = any(site.kind == "decoder" for site in self.sites if site.stack is stack)

        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = _Given(names, args, kwargs)
            if caches and self._at("cache"):
                self._provide_cache(module.config, given)
            tokens = given.get("input_ids")
            tokens = given.get("inputs_embeds") if tokens is None else tokens
            cache = given.get("past_key_values")
            step = Step(past=0 if cache is None else int(cache.get_seq_length()))
            if tokens is not None:
                n = tokens.shape[1]
                step.positions = given.get("position_ids")
                if step.positions is None:
                    step.positions = torch.arange(step.past, step.past + n, device=tokens.device)[None]
                padding = given.get("attention_mask")
                if isinstance(padding, Tensor) and padding.ndim == 2 and not bool(padding.all()):
                    step.valid = padding[:, -n:].bool()
            self.begun[stack] = step
            return given.args, given.kwargs

        return hook

    def _before(self, site: Site):
        """Pre-hook of a site: stage `hidden`, and the step for the cache layer and the call."""
        methods = self._at("hidden", site=site)
        names = _parameter_names(site.module)
        entering = "hidden_states" if "hidden_states" in names else names[0]

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = _Given(names, args, kwargs)
            for method in methods:
                given.set(entering, method.hidden(site, given.get(entering)))
            step = replace(self.begun[site.stack]) if site.stack in self.begun else Step()
            angles = given.get("position_embeddings")
            if angles is not None and site.rotary is not None:
                step.cos, step.sin = angles[0][:, None], angles[1][:, None]
            if site.stack is None and given.get("context") is None:  # a mechanism of regard
                step.valid = given.get("valid")
            layer = _cache_layer(site, given)
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
        cache.layers = method.cache(list(layers), self._sites_of(method))
        cache.layer_class_to_replicate = None
        cache.regard_method = method  # type: ignore[attr-defined]

    # --- attention ----------------------------------------------------------------------------------------------

    def _interface_function(self, site: Site, stages: Stages):
        """What transformers calls in place of its own attention functions."""

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
            slots: Any = getattr(layer, "slots", None)
            mask: Mask | None
            bias: Tensor | None
            dropped = slots is not None and layer.seen != m  # then slot and position differ
            if dropped:
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
                mask, bias = interface.as_mask(attention_mask, n, m, causal)
            if kwargs.get("position_bias") is not None:  # T5's
                bias = kwargs["position_bias"] if bias is None else bias + kwargs["position_bias"]
            call = Call(
                site, query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling,
                self._step(site, query), bias=bias, layer=layer,
                key_positions=None if slots is None else slots.positions,
            )  # fmt: skip
            out = stages.run(call, weights=bool(kwargs.get("output_attentions")), dropped=dropped)
            return out.transpose(1, 2).contiguous(), call.weights

        return forward

    def _call_function(self, site: Site, stages: Stages) -> Attend:
        """What a module's call of a known attention function comes to."""

        def attend(
            query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None, bias: Tensor | None, scale: float
        ) -> Tensor:
            if isinstance(mask, Tensor):
                mask = masks.from_dense(mask.expand(*mask.shape[:-2], query.shape[2], key.shape[2]))
            if site.index not in self.steps:
                raise Unsupported(
                    f"{site.name} ({type(site.module).__name__}) computes attention more than once in a forward"
                )
            call = Call(site, query, key, value, mask, scale, self._step(site, query), bias=bias)
            del self.steps[site.index]
            return stages.run(call)

        return attend

    def _step(self, site: Site, query: Tensor) -> Step:
        step, n = self.steps[site.index], query.shape[2]
        if step.positions is None or site.stack is None:  # pictures, sounds, single modules
            step.positions = torch.arange(step.past, step.past + n, device=query.device)[None]
        return step


def _cache_layer(site: Site, given: "_Given") -> Any:
    """The layer of the cache that a site's keys come from, where there is one."""
    cache = next((c for c in map(given.get, _CACHE_ARGUMENTS) if c is not None), None)
    if cache is None:
        return None
    half = "cross_attention_cache" if site.kind == "cross" else "self_attention_cache"
    layers = getattr(cache, half, cache).layers
    return layers[site.layer] if site.layer < len(layers) else None


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


def _per_query_head(valid: Tensor, num_heads: int) -> Tensor:
    """(B, Hk or 1, M) flags of key-value heads as flags of the query heads that share them."""
    return valid if valid.shape[1] == 1 else valid.repeat_interleave(num_heads // valid.shape[1], dim=1)
