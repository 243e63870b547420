"""Whether a saliency map is about the class it was made for, and a way to make it more so."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from regard.errors import ShapeError
from regard.probes.saliency import class_scores, evaluating

Saliency = Callable[[nn.Module, Tensor, Tensor], Tensor]


def class_sensitivity(saliency_fn: Saliency, model: nn.Module, images: Tensor) -> float:
    """How alike the maps of the most and the least likely class are (arXiv:2004.02866); lower is better.

        ρ = mean over pictures of corr_u(S(x, argmax logits)_u, S(x, argmin logits)_u)

    1 says that the maps do not know the class. Two constant maps count as 1, one constant map as 0.

    Args:
        saliency_fn: model, pictures and classes (B,) to maps (B, H, W).
        model: images to logits (B, K).
        images: (B, C, H, W).

    Raises:
        ShapeError: the model gives no logits, or the function no maps.
    """
    with torch.no_grad(), evaluating(model):
        logits = model(images)
    class_scores(logits, None, images.shape[0])  # its checks
    first, second = (saliency_fn(model, images, classes) for classes in (logits.argmax(1), logits.argmin(1)))
    if first.shape != second.shape or first.dim() != 3 or first.shape[0] != images.shape[0]:
        raise ShapeError(f"saliency_fn: expected maps ({images.shape[0]}, H, W), got {tuple(first.shape)}")
    a, b = (maps.flatten(1).double() for maps in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = torch.stack([a.norm(dim=1), b.norm(dim=1)])
    flat = (norms == 0).sum(0)
    alike = (a * b).sum(1) / norms.prod(0).where(flat == 0, 1.0)
    return float(torch.where(flat == 2, 1.0, alike).mean())


def meta_saliency(
    saliency_fn: Saliency, model: nn.Module, x: Tensor, target: int | Tensor | None = None, eps: float = 1e-3
) -> Tensor:
    """The saliency of the model after one small step of learning that picture's class (arXiv:2004.02866).

        S(θ - ε ∇_θ L, x)        L(θ, x) = -logit_c

    What the step changes is what the class depends on, so to first order the loss loses ε |∇_θ L|². The step is made
    for every picture alone, on a copy of the model, and is a constant to what comes after: its own dependence on x
    would double the first-order term, which is a choice of ε. One more forward and backward per picture.

    Args:
        saliency_fn: model, pictures and classes (B,) to maps (B, H, W).
        model: x to logits (B, K).
        x: (B, C, H, W).
        target: the class, one for all or (B,); the most likely one by default.
        eps: ε; below zero for a step of forgetting.
    """
    maps = []
    with evaluating(model), torch.no_grad():
        logits = model(x)
    class_scores(logits, target, x.shape[0])  # its checks
    classes = logits.argmax(1) if target is None else torch.as_tensor(target, device=x.device).expand(x.shape[0])
    for i in range(x.shape[0]):
        stepped = deepcopy(model).requires_grad_()
        parameters = list(stepped.parameters())
        with torch.enable_grad(), evaluating(stepped):
            loss = -class_scores(stepped(x[i : i + 1].detach()), classes[i : i + 1], 1).sum()
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                if slope is not None:
                    parameter.sub_(eps * slope)
        maps.append(saliency_fn(stepped, x[i : i + 1], classes[i : i + 1]))
    return torch.cat(maps)
