"""Ways to say which places of a picture speak for a class, by name, and their scores side by side."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import require
from regard.probes import (
    context_aware_saliency,
    gradcam,
    gradient,
    insertion_deletion,
    linear_approx,
    lrp,
    normgrad,
    pointing_game,
    record,
)

#: model, pictures (B, C, H, W) and classes (B,) to maps (B, H, W)
Attribution = Callable[[nn.Module, Tensor, Tensor], Tensor]


def for_convolutions(layers: Sequence[str], *, window: int, seed: int = 0) -> dict[str, Attribution]:
    """What an `nn.Sequential` of convolutions can be asked; see `for_any`."""
    return {
        **for_any(layers, window=window, seed=seed),
        "LRP z": partial(_relevance, rule="z"),
        "LRP z+": partial(_relevance, rule="zplus"),
        "LRP ε": partial(_relevance, rule="epsilon"),
        "salient relevance": partial(_areas, rule="z"),
        "salient relevance, z+": partial(_areas, rule="zplus"),
    }


def for_any(layers: Sequence[str], *, window: int, ig_steps: int = 16, seed: int = 0) -> dict[str, Attribution]:
    """What any network can be asked.

    Args:
        layers: whose NormGrad maps are multiplied; Grad-CAM and the linear approximation take the last.
        window: side of the square that occlusion hides, in pixels.
        ig_steps: of integrated gradients.
        seed: of the random maps, the baseline that says nothing.
    """
    return {
        "random": partial(_random, seed=seed),
        "gradient": gradient,
        "integrated gradients": partial(_integrated_gradients, steps=ig_steps),
        "occlusion": partial(_occlusion, window=window),
        "Grad-CAM": partial(gradcam, layers=layers[-1:]),
        "linear approximation": partial(linear_approx, layers=layers[-1:]),
        "NormGrad": partial(normgrad, layers=layers),
        "NormGrad, last layer": partial(normgrad, layers=layers[-1:]),
    }


def scores(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    maps: Mapping[str, Tensor],
    inside: Tensor,
    *,
    steps: int,
    perturbed: int | None = None,
    on_method: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard error by method and score: pointing, insertion, deletion.

    Args:
        x, target: (B, C, H, W) pictures and (B,) classes. Classes do not exclude each other.
        maps: by method (B, H, W).
        inside: (B, 4) boxes or (B, H, W) pixels of the object.
        steps: of insertion and deletion.
        perturbed: number of pictures that those are measured on, all by default. A pixel taken away becomes the
            picture's mean colour.
    """
    found = {}
    few = slice(0, perturbed)
    blank = x[few].mean((2, 3), keepdim=True)
    for name, own in maps.items():
        on_method(name)
        changed = insertion_deletion(model, x[few], own[few], target[few], steps, blank, probability=torch.sigmoid)
        found[name] = {
            "pointing": mean_and_error(pointing_game(own, inside)),
            "insertion": mean_and_error(changed.insertion),
            "deletion": mean_and_error(changed.deletion),
        }
    return found


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean, and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std(correction=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def mass_inside(maps: Tensor, boxes: Tensor, share: float = 0.2) -> Tensor:
    """(B,) how much of a map's mass on its `share` highest pixels lies in the box (B, 4)."""
    flat = maps.flatten(1)
    kept = flat.topk(round(share * flat.shape[1]))
    y, x = torch.arange(maps.shape[1])[:, None], torch.arange(maps.shape[2])
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    inside = ((y >= top) & (y < bottom) & (x >= left) & (x < right)).flatten(1).gather(1, kept.indices)
    return (kept.values * inside).sum(1) / kept.values.sum(1).clamp(min=1e-12)


def attention_rollout(network: nn.Module, x: Tensor) -> Tensor:
    """(B, H, W): what the patch tokens' mean holds of every patch, by arXiv:2005.00928; it knows of no class.

    rollout = Π over layers of (mean over heads of A + I) / 2
    """
    weights = [layer.rows for layer in record(network, x, queries="all").layers.values()]
    total = torch.eye(weights[0].shape[-1])
    for layer in weights:
        total = (layer.mean(1) + torch.eye(layer.shape[-1])) / 2 @ total
    side = math.isqrt(total.shape[-1] - 1)
    maps = total[:, 1:, 1:].mean(1).unflatten(1, (side, side))
    return F.interpolate(maps[:, None], x.shape[2:], mode="bilinear")[:, 0]


def _random(model: nn.Module, x: Tensor, target: Tensor, *, seed: int) -> Tensor:
    coarse = torch.rand(len(x), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, x.shape[2:], mode="bicubic")[:, 0]


def _integrated_gradients(model: nn.Module, x: Tensor, target: Tensor, *, steps: int) -> Tensor:
    captum = require("captum.attr", "compute integrated gradients")
    method = captum.IntegratedGradients(model)
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    found = method.attribute(x, blank, target, n_steps=steps, internal_batch_size=max(16, len(x)))
    return found.sum(1).abs().float()


def _occlusion(model: nn.Module, x: Tensor, target: Tensor, *, window: int) -> Tensor:
    captum = require("captum.attr", "occlude pictures")
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    shape, stride = (x.shape[1], window, window), (x.shape[1], window // 2, window // 2)
    with torch.no_grad():
        return captum.Occlusion(model).attribute(x, shape, stride, blank, target).mean(1)


def _relevance(model: nn.Module, x: Tensor, target: Tensor, *, rule: str) -> Tensor:
    return lrp(model, x, target, rule).abs().sum(1)


def _areas(model: nn.Module, x: Tensor, target: Tensor, *, rule: str) -> Tensor:
    return context_aware_saliency(_relevance(model, x, target, rule=rule)[:, None])
