"""Pictures with the local statistics of another and none of its arrangement."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers.hooks import captured, modules_named

#: L-BFGS starts anew after so many iterations, because clipping the pixels invalidates its history
_ROUND = 50


class Texture(NamedTuple):
    """images as the originals, and their loss Σ_l w_l |G_l - G_l(original)|², (B,) or a number for one picture."""

    images: Tensor
    loss: Tensor


def gram(features: Tensor) -> Tensor:
    """(B, C, C) G = F Fᵀ / (C H W) of feature maps (B, C, H, W); positions do not matter.

    Raises:
        ShapeError: other dimensions.
    """
    if features.dim() != 4:
        raise ShapeError(f"features: expected (B, C, H, W), got {tuple(features.shape)}")
    flat = features.flatten(2)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])


def grams(images: Tensor, extractor: nn.Module, layers: Sequence[str]) -> list[Tensor]:
    """The Gram matrices of pictures (B, C, H, W) at the named layers."""
    with captured(extractor, layers) as outputs:
        extractor(images)
        return [gram(outputs[name]) for name in layers]


def gram_loss(first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """(B,) Σ_l w_l |G_l - G'_l|² of two lists of Gram matrices, all layers alike by default."""
    weights = [1.0] * len(first) if weights is None else weights
    pairs = zip(first, second, weights, strict=True)
    return torch.stack([w * (a - b).square().sum((1, 2)) for a, b, w in pairs]).sum(0)


def texture_synthesis(
    image: Tensor,
    extractor: nn.Module,
    layers: Sequence[str],
    steps: int = 300,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Texture:
    """From noise to a picture with the original's Gram matrices: L-BFGS, pixels clipped to [0, 1] (arXiv:2506.00718).

    The published stimuli take a trained VGG-19 (its first convolution and four poolings). Any other network, such as
    `RandomFilters`, makes stimuli of another kind and has to be named beside every result.

    Args:
        image: (C, H, W), or several (B, C, H, W), which are synthesised together; in [0, 1].
        extractor: takes pictures as they are, so normalisation belongs inside; its weights are left alone.
        layers: names of its submodules that give (B, C', H', W').
        steps: iterations.
        seed: of the noise.
        weights: w_l, one per layer.
        on_progress: called with the steps done and their number.

    Raises:
        ArgumentError: no steps, not one weight above 0 per layer, pixels outside [0, 1], or a layer that the extractor
            does not have.
        ShapeError: no picture.
    """
    if image.dim() not in (3, 4):
        raise ShapeError(f"image: expected (C, H, W) or (B, C, H, W), got {tuple(image.shape)}")
    if not (image.min() >= 0 and image.max() <= 1):
        raise ArgumentError(f"image: expected pixels in [0, 1], got {image.min():.4g} to {image.max():.4g}")
    if steps < 1:
        raise ArgumentError(f"steps: expected at least 1, got {steps}")
    if weights is not None and (len(weights) != len(layers) or min(weights) <= 0):
        raise ArgumentError(f"weights: expected {len(layers)} numbers above 0, got {weights}")
    modules_named(extractor, layers)
    images = image if image.dim() == 4 else image[None]
    with torch.no_grad():
        wanted = grams(images, extractor, layers)
        # a constant per picture, which the optimiser's tolerances are made for
        unit = gram_loss(wanted, [torch.zeros_like(g) for g in wanted], weights).clamp_min(1e-12)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    pixels = noise.to(images).requires_grad_()
    for start in range(0, steps, _ROUND):
        count = min(_ROUND, steps - start)
        optimizer = torch.optim.LBFGS(
            [pixels], max_iter=count, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            with torch.enable_grad():
                loss = (gram_loss(grams(pixels, extractor, layers), wanted, weights) / unit).sum()
                (pixels.grad,) = torch.autograd.grad(loss, [pixels])
            return loss.detach()

        optimizer.step(closure)
        with torch.no_grad():
            pixels.clamp_(0, 1)
        if on_progress is not None:
            on_progress(start + count, steps)
    with torch.no_grad():
        found = pixels.detach()
        loss = gram_loss(grams(found, extractor, layers), wanted, weights)
    return Texture(found, loss) if image.dim() == 4 else Texture(found[0], loss[0])


class RandomFilters(nn.Module):
    """Random filters of several sizes side by side, a deterministic extractor for Gram matching without a trained net.

    Layers: "pixels", the pixels and a one, so that their means and covariances are matched; and "filters.0", … one per
    size, relu of filters without mean and of norm 1, with the picture continued by reflection.

    Args:
        channels: of the pictures.
        filters: of each size.
        sizes: odd.
        seed: of the filters.
    """

    def __init__(self, channels: int = 3, filters: int = 32, sizes: Sequence[int] = (3, 5, 9), seed: int = 0):
        super().__init__()
        if channels < 1 or filters < 1:
            raise ArgumentError(f"channels and filters: expected at least 1, got {channels} and {filters}")
        if not sizes or any(size < 3 or size % 2 == 0 for size in sizes):
            raise ArgumentError(f"sizes: expected odd numbers from 3, got {tuple(sizes)}")
        generator = torch.Generator().manual_seed(seed)
        self.pixels = _WithOne()
        self.filters = nn.ModuleList(_Filters(channels, filters, size, generator) for size in sizes)

    @property
    def layers(self) -> tuple[str, ...]:
        """All names."""
        return ("pixels", *(f"filters.{i}" for i in range(len(self.filters))))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.pixels(images), *(layer(images) for layer in self.filters)]


class _WithOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)


class _Filters(nn.Module):
    weight: Tensor

    def __init__(self, channels: int, filters: int, size: int, generator: torch.Generator):
        super().__init__()
        weight = torch.randn(filters, channels, size, size, generator=generator)
        weight = weight - weight.mean((2, 3), keepdim=True)
        self.register_buffer("weight", weight / weight.flatten(1).norm(dim=1)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        border = self.weight.shape[-1] // 2
        return F.conv2d(F.pad(x, (border,) * 4, mode="reflect"), self.weight).relu()
