"""Which places of a picture speak for a class, by one backward pass: NormGrad and its relatives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported

Extract = Literal["bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise"]
Aggregate = Literal["sum", "max", "abs_max", "norm", "filter_norm"]
Combine = Literal["product", "geometric"]

_DENSE = ("conv1x1", "conv3x3")  # each channel of the input with each of the gradient


def backprop_saliency(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    layers: Sequence[str | None] = (None,),
    extract: Extract = "conv1x1",
    aggregate: Aggregate = "norm",
    combine: Combine = "product",
    size: tuple[int, int] | None = None,
    *,
    weights: Sequence[float] | None = None,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Saliency from what each place would give to the gradient of a layer inserted there (arXiv:2004.02866).

        bias: -g_u    scaling: -x_u g_u    conv1x1: -x_u g_uᵀ    conv3x3: -p_u g_uᵀ    conv3x3_depthwise: -p_uc g_uc

    x_u and g_u are a layer's output at place u and the gradient of -logit there, p_u the 3×3 neighbourhood of x_u,
    zero outside. The numbers at u are aggregated to one; the map is resized bilinearly and scaled to [0, 1]; the maps
    of all layers are multiplied. conv1x1 with norm is NormGrad, |x_u| |g_u|; scaling with sum the linear
    approximation. A constant map, such as the bias below global pooling, is all zeros.

    One forward, one backward, and O(C H W): no outer product is formed. The model runs in evaluation mode and is left
    as it was; pictures of a batch do not influence each other.

    Args:
        model: x to logits (B, K).
        x: (B, C, H, W).
        target: the class, one for all or (B,) one each; the most likely one by default.
        layers: names of modules whose outputs are looked at; None stands for the input itself.
        extract: the layer that is thought to be inserted.
        aggregate: sum, largest number, largest magnitude, L2 norm, or L2 norm of the positive ones (filter_norm).
        combine: product of the layers' maps, or their geometric mean.
        size: height and width of the result, those of x by default.
        weights: of the layers in the geometric mean, equal by default.
        grid: height and width where a layer's output is tokens (B, N, C), of which the last H·W are taken; by default
            they are a square, or one after a class token.
        channels_last: whether outputs of four axes are (B, H, W, C).

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        ArgumentError: an unknown layer, choice, class or grid.
        ShapeError: x, or what a layer or the model gives, is of another shape.
        Unsupported: a layer that the logits do not depend on, or whose output is no tensor.
    """
    _one_of("extract", extract, get_args(Extract))
    _one_of("aggregate", aggregate, get_args(Aggregate))

    def reduced(a: Tensor, b: Tensor) -> Tensor:
        if extract == "bias":
            a = torch.ones_like(a)
        return contribution(a, b, 3 if "3x3" in extract else 1, aggregate, dense=extract in _DENSE)

    return _saliency(model, x, target, layers, reduced, combine, size, weights, grid, channels_last)


def normgrad(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    layers: Sequence[str | None] = (None,),
    combine: Combine = "product",
    size: tuple[int, int] | None = None,
    *,
    weights: Sequence[float] | None = None,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """NormGrad (arXiv:2004.02866): how much each place would give to the gradient of a 1×1 convolution put there.

        S_u = |x_u| |g_u|

    x_u and g_u are a layer's output at place u and the gradient of the logit there: the norm of their outer product,
    which is the share of u in the convolution's weight gradient. Maps are resized bilinearly, scaled to [0, 1], and
    multiplied over the layers; `backprop_saliency` has every other extraction and aggregation of the paper. One
    forward and one backward, O(C H W). A layer below global average pooling has the same gradient everywhere, so its
    map says where something is, and not what; one or two layers further down do better (`regard study saliency`).

    Args:
        model: x to logits (B, K); evaluated, and left as it was.
        x: (B, C, H, W).
        target: the class, one for all or (B,) one each; the most likely one by default.
        layers: names of modules whose outputs are looked at; None stands for the input itself.
        combine: product of the layers' maps, or their geometric mean.
        size: height and width of the result, those of x by default.
        weights: of the layers in the geometric mean, equal by default.
        grid: height and width where a layer's output is tokens (B, N, C), of which the last H·W are taken; by default
            they are a square, or one after a class token.
        channels_last: whether outputs of four axes are (B, H, W, C).

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        ArgumentError, ShapeError, Unsupported: as `backprop_saliency` does.
    """
    return backprop_saliency(
        model, x, target, layers, "conv1x1", "norm", combine, size,
        weights=weights, grid=grid, channels_last=channels_last,
    )  # fmt: skip


def gradcam(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None = None,
    layers: Sequence[str | None] = (None,),
    combine: Combine = "product",
    size: tuple[int, int] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Grad-CAM (arXiv:1610.02391): max(0, -x_u·ḡ), with the gradient's mean over places; see `backprop_saliency`.

    It is meant for the last convolution; further down the mean of the gradient says little.
    """

    def reduced(a: Tensor, b: Tensor) -> Tensor:
        return (a * b.mean((2, 3), keepdim=True)).sum(1).clamp(min=0)

    return _saliency(model, x, target, layers, reduced, combine, size, None, grid, channels_last)


linear_approx = partial(backprop_saliency, extract="scaling", aggregate="sum")
gradient = partial(backprop_saliency, extract="bias", aggregate="abs_max")


def contribution(a: Tensor, b: Tensor, kernel_size: int, aggregate: Aggregate, *, dense: bool) -> Tensor:
    """One number per place for the products of an input's neighbourhood with b = -gradient, without the products.

    They factorise: the norm of an outer product is the product of norms, its largest entry is the product of two
    extremes, and its positive part pairs equal signs.

    Args:
        a, b: (B, C, H, W).
        kernel_size: odd side of the neighbourhood.
        aggregate: see `backprop_saliency`.
        dense: every channel of a with every one of b, rather than each with its own.

    Returns:
        (B, H, W).
    """
    k = kernel_size

    def around(values: Tensor) -> Tensor:
        """The sum over the neighbourhood."""
        return F.avg_pool2d(values, k, 1, k // 2, divisor_override=1) if k > 1 else values

    def paired(left: Tensor, right: Tensor) -> Tensor:
        return left.sum(1) * right.sum(1) if dense else (left * right).sum(1)

    if aggregate == "sum":
        return paired(around(a), b)
    if aggregate == "norm":
        return paired(around(a.square()), b.square()).sqrt()
    if aggregate == "filter_norm":
        signs = [(around((s * a).clamp(min=0).square()), (s * b).clamp(min=0).square()) for s in (1, -1)]
        return sum(paired(*both) for both in signs).sqrt()  # type: ignore[union-attr]
    padded = F.pad(a, (k // 2,) * 4)
    high, low = F.max_pool2d(padded, k, 1), -F.max_pool2d(-padded, k, 1)
    if dense:
        high, low = high.amax(1, keepdim=True), low.amin(1, keepdim=True)
        b = torch.cat([b.amax(1, keepdim=True), b.amin(1, keepdim=True)], 1)
    corners = torch.cat([high * b, low * b], 1)
    return (corners.abs() if aggregate == "abs_max" else corners).amax(1)


def _saliency(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None,
    layers: Sequence[str | None],
    reduced: Callable[[Tensor, Tensor], Tensor],
    combine: Combine,
    size: tuple[int, int] | None,
    weights: Sequence[float] | None,
    grid: tuple[int, int] | None,
    channels_last: bool,
) -> Tensor:
    _one_of("combine", combine, get_args(Combine))
    if x.dim() != 4:
        raise ShapeError(f"x: expected pictures (B, C, H, W), got {tuple(x.shape)}")
    if isinstance(layers, str) or not layers:
        raise ArgumentError(f"layers: expected a list of names, got {layers!r}")
    if weights is not None and (combine != "geometric" or len(weights) != len(layers) or sum(weights) <= 0):
        raise ArgumentError(f"weights: expected {len(layers)} for combine='geometric', got {weights} for {combine!r}")
    total = x.new_ones(x.shape[0], *(size or x.shape[2:]))
    for i, (output, slope) in enumerate(zip(*_observe(model, x, target, layers), strict=True)):
        last = channels_last and layers[i] is not None
        a, b = (_as_grid(tensor.detach(), grid, last) for tensor in (output, -slope))
        found = _normalised(reduced(a, b), total.shape[-2:])
        if combine == "geometric":
            share = 1 / len(layers) if weights is None else weights[i] / sum(weights)
            found = found**share
        total = total * found
    return total


def _observe(
    model: nn.Module, x: Tensor, target: int | Tensor | None, layers: Sequence[str | None]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The layers' outputs, and the gradients of -logit there."""
    modules = dict(model.named_modules())
    if unknown := [name for name in layers if name is not None and name not in modules]:
        raise ArgumentError(f"layers: the model has no module {unknown}; it has: {', '.join(filter(None, modules))}")
    x = x.detach().clone().requires_grad_()  # so that frozen models have gradients too
    seen: dict[str | None, Tensor] = {None: x}
    handles = []

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor):
                raise Unsupported(f"layers: {name} gives a {type(output).__name__}, expected a tensor")
            if name in seen:
                raise ArgumentError(f"layers: {name} runs more than once in one forward")
            seen[name] = output
            return output.clone()  # what comes later may change it in place

        handles.append(modules[name].register_forward_hook(hook))

    try:
        for name in dict.fromkeys(filter(lambda name: name is not None, layers)):
            watch(name)  # type: ignore[arg-type]
        with torch.enable_grad(), evaluating(model):
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in seen]:
        raise Unsupported(f"layers: {missing} did not run")
    loss = -class_scores(logits, target, x.shape[0]).sum()
    outputs = [seen[name] for name in layers]
    slopes = torch.autograd.grad(loss, outputs, allow_unused=True)
    if unused := [name for name, slope in zip(layers, slopes, strict=True) if slope is None]:
        raise Unsupported(f"layers: the logits do not depend on {unused}")
    return outputs, slopes


def class_scores(logits: Tensor, target: int | Tensor | None, batch: int) -> Tensor:
    """(B,) the logit of the class that each picture is asked for.

    Raises:
        ShapeError: the logits are not (B, K), or the classes not (B,).
        ArgumentError: there is no such class.
    """
    if logits.dim() != 2 or logits.shape[0] != batch:
        raise ShapeError(f"model: expected logits ({batch}, K) as its output, got {tuple(logits.shape)}")
    chosen = logits.argmax(1) if target is None else torch.as_tensor(target, device=logits.device)
    if chosen.dim() > 1 or (chosen.dim() == 1 and chosen.shape[0] != batch):
        raise ShapeError(f"target: expected one class or ({batch},), got {tuple(chosen.shape)}")
    if chosen.is_floating_point() or not bool(((chosen >= 0) & (chosen < logits.shape[1])).all()):
        raise ArgumentError(f"target: expected classes 0..{logits.shape[1] - 1}, got {target}")
    return logits.gather(1, chosen.long().expand(batch)[:, None])[:, 0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its modules gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _as_grid(output: Tensor, grid: tuple[int, int] | None, channels_last: bool) -> Tensor:
    """(B, C, H, W) of a grid, or of tokens, whose class token is dropped."""
    if output.dim() == 4:
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.dim() != 3:
        raise ShapeError(f"layers: expected outputs (B, C, H, W) or tokens (B, N, C), got {tuple(output.shape)}")
    n, side = output.shape[1], isqrt(output.shape[1])
    if grid is None and n - side**2 > 1:
        raise ArgumentError(f"grid: needed to lay out {n} tokens, which are no square with or without a class token")
    height, width = grid or (side, side)
    if not 0 < height * width <= n:
        raise ArgumentError(f"grid: {height} × {width} does not fit {n} tokens")
    return output[:, n - height * width :].transpose(1, 2).unflatten(2, (height, width))


def _normalised(found: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) resized, and scaled to [0, 1]; rounding in a constant map does not count."""
    flat = found.flatten(1)
    constant = flat.amax(1) - flat.amin(1) <= 8 * torch.finfo(found.dtype).eps * flat.abs().amax(1)
    found = F.interpolate(found[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    found = found - found.amin((1, 2), keepdim=True)
    found = found / found.amax((1, 2), keepdim=True)
    return torch.where(constant[:, None, None], torch.zeros_like(found), found)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
