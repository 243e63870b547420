"""Layer-wise relevance propagation: how much each input of a network gave to a class, layer by layer backwards."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from regard.errors import ArgumentError, Unsupported
from regard.probes.saliency import class_scores, evaluating

Rule = Literal["z", "zplus", "epsilon"]

_UNCHANGED = (nn.ReLU, nn.Dropout, nn.Dropout2d, nn.Identity)
_RESHAPED = (nn.Flatten, nn.Unflatten)
_AVERAGED = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_KNOWN = (*_UNCHANGED, *_RESHAPED, *_AVERAGED, nn.Linear, nn.Conv2d, nn.MaxPool2d)
_TINY = 1e-9


def lrp(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    rule: Any = "z",
    *,
    epsilon: float = 1e-6,
) -> Tensor:
    """Relevance of every input for the logit of a class (arXiv:1712.08268, step 1; the rules are arXiv:1706.07979's).

        R_in = x · Vᵀ(R_out / Z)        starting from the logit of the class, 0 for the others

    | rule | V | Z | |
    |---|---|---|---|
    | `"z"` linear | max(W, 0) | V x + 1e-9 | as published with the first step above; bias ignored |
    | `"z"` convolution, average | W | W x + b + 1e-9 | Z may be near zero: relevance may explode |
    | `"zplus"` | max(W, 0) | V x + 1e-9 | of both; meant for inputs that are not negative |
    | `"epsilon"` | W | W x + b + ε sign | of both |

    Activations and dropout pass relevance on, max pooling gives it to the winner. Where windows overlap and share a
    winner, `"z"` keeps the last window's as published, the others add up. What Z says of a bias is lost; without one
    the sum stays that of the logit, up to 1e-9.

    Relevance at an inner layer k is that of the rest of the model: ``lrp(model[k:], model[:k](x))``.

    Args:
        model: an `nn.Sequential` (nested ones too) of linear layers, convolutions, ReLU, dropout, pooling and
            flattening; x to logits (B, K). Its mode is left as it was, evaluation is what is looked at.
        x: (B, ...).
        target: the class, one for all or (B,) one each; the most likely one by default.
        rule: a name, or a composite of zennit for every other rule (gamma, alpha-beta, rules that differ by layer) and
            every other network; the logit of the class is then what zennit propagates.
        epsilon: of that rule.

    Returns:
        The relevance, shaped like x.

    Raises:
        ArgumentError: an unknown rule or class.
        Unsupported: a layer with no rule here; batch norms can be folded into convolutions
            (`torch.nn.utils.fusion.fuse_conv_bn_eval`), for the rest there is zennit.
        ShapeError: the model gives no logits.
    """
    if not isinstance(rule, str) and hasattr(rule, "register") and hasattr(rule, "remove"):
        return _by_zennit(model, x, target, rule)
    if rule not in get_args(Rule):
        raise ArgumentError(f"rule: expected {', '.join(get_args(Rule))} or a composite of zennit, got {rule!r}")
    if epsilon <= 0:
        raise ArgumentError(f"epsilon: expected a positive number, got {epsilon}")
    layers = list(_flat(model))
    if unknown := [layer for layer in layers if not isinstance(layer, _KNOWN)]:
        raise Unsupported(f"model: no rule for {unknown[0]}; a composite of zennit as the rule may have one")
    inputs = [x]
    with torch.no_grad(), evaluating(model):
        for layer in layers:  # a ReLU in place would change what the layer below gave
            inputs.append(F.relu(inputs[-1]) if isinstance(layer, nn.ReLU) else layer(inputs[-1]))
        relevance = _start(inputs[-1], target)
        for layer, before, after in zip(layers[::-1], inputs[-2::-1], inputs[:0:-1], strict=True):
            relevance = _back(layer, before, after, relevance, rule, epsilon)
    return relevance


def _start(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """(B, K): the logit of the class, zero elsewhere."""
    class_scores(logits, target, logits.shape[0])  # its checks
    classes = logits.argmax(1) if target is None else torch.as_tensor(target, device=logits.device)
    return logits * F.one_hot(classes.expand(logits.shape[0]).long(), logits.shape[1])


def _back(layer: nn.Module, x: Tensor, y: Tensor, relevance: Tensor, rule: str, epsilon: float) -> Tensor:
    """The relevance of a layer's input x from that of its output y."""
    if isinstance(layer, _UNCHANGED):
        return relevance
    if isinstance(layer, _RESHAPED):
        return relevance.reshape(x.shape)
    if isinstance(layer, nn.MaxPool2d):
        return _to_winners(layer, x, y, relevance, overwrite=rule == "z")
    positive = not isinstance(layer, _AVERAGED) and (rule == "zplus" or (rule == "z" and isinstance(layer, nn.Linear)))
    changed = _positive(layer) if positive else {}
    z, transposed, *_ = torch.func.vjp(partial(functional_call, layer, changed), x)
    z = z + (epsilon * torch.where(z < 0, -1.0, 1.0) if rule == "epsilon" else _TINY)
    return x * transposed(relevance / z)[0]


def _positive(layer: nn.Module) -> dict[str, Tensor]:
    """The positive weights, and no bias."""
    parameters = dict(layer.named_parameters())
    return {n: p.clamp(min=0) if n == "weight" else torch.zeros_like(p) for n, p in parameters.items()}


def _to_winners(layer: nn.MaxPool2d, x: Tensor, y: Tensor, relevance: Tensor, *, overwrite: bool) -> Tensor:
    """All relevance of a window to its largest entry."""
    options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
    winners = F.max_pool2d(x, *options, return_indices=True)[1].flatten(2)
    found = torch.zeros_like(x).flatten(2)
    if overwrite:
        found.scatter_(2, winners, (relevance * y / (y + _TINY)).flatten(2))
    else:
        found.scatter_add_(2, winners, relevance.flatten(2))
    return found.view_as(x)


def _by_zennit(model: nn.Module, x: Tensor, target: int | Tensor | None, composite: Any) -> Tensor:
    """What zennit propagates from the logit of the class."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), evaluating(model), composite.context(model) as changed:
        logits = changed(x)
        (relevance,) = torch.autograd.grad(logits, x, _start(logits.detach(), target))
    return relevance


def _flat(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, nn.Sequential):
        for layer in model:
            yield from _flat(layer)
    else:
        yield model
