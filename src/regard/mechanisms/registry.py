"""Modules by their name in the catalogue."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from regard import catalog
from regard.errors import ArgumentError, Unsupported
from regard.mechanisms.base import Mechanism
from regard.mechanisms.heads.latent import MultiHeadLatentAttention
from regard.mechanisms.softmax import SoftmaxAttention

#: what the literature is compared with, and has no entry in the catalogue
BASELINES: dict[str, type[Mechanism]] = {"softmax": SoftmaxAttention, "mla": MultiHeadLatentAttention}


def create(name: str, **config: Any) -> nn.Module:
    """Any mechanism or model of the catalogue, or a baseline ("softmax"), with fresh weights.

        layer = regard.create("sigmoid-attention", dim=256, num_heads=4)
        model = regard.create("mala-tiny", num_classes=10)      # a published configuration
        model = regard.create("mala/model", embed_dims=...)     # a part of a system, configured freely

    Raises:
        ArgumentError: an unknown name or argument.
        Unsupported: the system is planned, or is no module (a method, a mask, a probe).
    """
    cls, preset = _resolve(name)
    config = preset | config
    accepted = inspect.signature(cls.__init__).parameters
    if unknown := [key for key in config if key not in accepted]:
        known = ", ".join(key for key in accepted if key != "self")
        raise ArgumentError(f"{name}: unknown argument {', '.join(unknown)}; it takes: {known}")
    try:
        inspect.signature(cls).bind(**config)
    except TypeError as error:
        raise ArgumentError(f"{name}: {error}") from None
    return cls(**config)


def from_official(name: str, state_dict: Mapping[str, Tensor], **official_kwargs: Any) -> nn.Module:
    """A module with the weights of the published code, from that code's state dict and constructor arguments.

    Every weight is used, and none is missing. Where a paper's code has several classes, ``variant`` says which: it is
    a part of the system (its network, say) or one of the variants that the class itself knows.

    Raises:
        ArgumentError: weights are missing, left over or of other shapes; an unknown argument.
        Unsupported: the system is planned, is no module, or has no published code.
    """
    if name not in BASELINES and official_kwargs.get("variant") in catalog.get(name).parts:
        name = f"{name}/{official_kwargs.pop('variant')}"
    cls = module_class(name)
    build = getattr(cls, "from_official", None)
    if build is None:
        raise Unsupported(f"{name}: there is no published code whose weights could be loaded")
    return build(dict(state_dict), **official_kwargs)


def module_class(name: str) -> type[nn.Module]:
    """What `create` builds.

    Raises:
        ArgumentError: an unknown name.
        Unsupported: the system is planned, or is no module.
    """
    return _resolve(name)[0]


def _resolve(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class behind a baseline, a system, a part of one ("slug/part") or a published model, and its arguments."""
    if name in BASELINES:
        return BASELINES[name], {}
    config: dict[str, Any] = {}
    if (owner := catalog.model_names().get(name)) is not None:
        found, config = catalog.get(owner).load_model(name)
    else:
        slug, _, part = name.partition("/")
        found = catalog.get(slug).load(part or None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            kinds = " and ".join(catalog.get(slug).kinds)
            raise Unsupported(f"{name} is no module that could be created; the catalogue calls it {kinds}")
    return found, config


def create_mixer(name: str, *, causal: bool, defaults: Mapping[str, Any], **config: Any) -> Mechanism:
    """A mechanism as a layer of a stack.

    ``defaults`` are what the stack offers to every layer (``dim``, ``num_heads``, ``rope_theta``, ``layer_idx`` …);
    each mechanism takes those it has arguments for. ``config`` is for this one, and must fit.

    Raises:
        ArgumentError: an unknown name or argument.
        Unsupported: no mechanism, or none that is legitimate in this use.
    """
    cls = module_class(name)
    if not issubclass(cls, Mechanism):
        raise Unsupported(f"{name} is a {cls.__name__}, which does not mix the tokens of a sequence")
    if not cls.patterns & ({"causal-self"} if causal else {"self"}):
        uses = ", ".join(sorted(cls.patterns))
        raise Unsupported(
            f"{name} has no {'causal' if causal else 'noncausal'} self-attention form; it supports: {uses}"
        )
    accepted = inspect.signature(cls.__init__).parameters
    offered = {**defaults, "causal": causal}
    mixer = create(
        name, **{key: value for key, value in offered.items() if key in accepted and key not in config}, **config
    )
    assert isinstance(mixer, Mechanism)
    return mixer
