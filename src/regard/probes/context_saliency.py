"""Context-aware saliency of a picture or a map, and the areas a network looks at by it: salient relevance."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.probes.relevance import lrp

_CHUNK = 2**22  # distances held at once: 16 MB
#: linear red, green and blue to X, Y and Z, each as a share of white (D65)
_XYZ = ((0.433953, 0.376220, 0.189827), (0.212671, 0.715160, 0.072169), (0.017758, 0.109477, 0.872765))


def context_aware_saliency(
    map_or_image: Tensor,
    patch: int = 7,
    k: int = 64,
    c: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    focus: float = 0.8,
    max_side: int = 250,
    *,
    step: int = 3,
) -> Tensor:
    """Which areas differ from what else the picture shows: arXiv:1712.08268, step 2, after Goferman et al. 2012.

        d(p, q) = d_colour / (1 + c d_pos)        S_i^r = 1 - exp(-mean of d(p_i^r, q) over the k smallest)

    p_i^r is the patch × patch piece around place i of the picture at scale r, q runs over the others at scales r, r/2
    and r/4. d_colour is the root mean square difference of their L*a*b* values, each scaled to [0, 1], and d_pos the
    distance of their centres in units of the longer side. Around foci, the places where S^r scaled to [0, 1] exceeds
    ``focus``, S^r fades with the distance to the nearest one: S^r (1 - d_foci), in the same units. The result is the
    mean over the scales, which are resized bicubically.

    Costs about (H W / step²)² patch comparisons per scale, of which a few rows exist at a time.

    Args:
        map_or_image: (H, W) a map, scaled to [0, 1] from its least to its largest value and taken as grey, or (3, H, W)
            sRGB in [0, 1]. With a dimension more in front, (B, 1, H, W) or (B, 3, H, W), a batch of them.
        patch: odd side of a patch in pixels; the picture's rim is continued outwards.
        k: number of the most similar patches; all where there are fewer.
        c: how much distance excuses difference.
        scales: of the picture; the largest is at most 1.
        focus: threshold of foci; 1 leaves the context out.
        max_side: a picture with a longer side is shrunk to this first.
        step: pixels from patch to patch; 1 compares all, the default about halves overlap.

    Returns:
        (H, W) or (B, H, W), in [0, 1]; 0 everywhere for a constant picture.

    Raises:
        ShapeError: neither a map nor a picture.
        ArgumentError: values outside [0, 1] or not finite, or an argument out of its range.
    """
    x = map_or_image.detach().float()
    if x.numel() == 0 or x.dim() not in (2, 3, 4) or (x.dim() > 2 and x.shape[-3] not in {3: (3,), 4: (1, 3)}[x.dim()]):
        expected = "(H, W), (3, H, W), (B, 1, H, W) or (B, 3, H, W)"
        raise ShapeError(f"map_or_image: expected {expected}, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ArgumentError("map_or_image: expected finite values")
    for name, value in (("patch", patch), ("k", k), ("max_side", max_side), ("step", step)):
        if value < 1 or (name == "patch" and value % 2 == 0):
            raise ArgumentError(f"{name}: expected a positive {'odd ' * (name == 'patch')}number, got {value}")
    if not scales or not all(0 < r <= 1 for r in scales):
        raise ArgumentError(f"scales: expected some in (0, 1], got {scales}")
    if c < 0 or not 0 < focus <= 1:
        raise ArgumentError(f"c and focus: expected c >= 0 and 0 < focus <= 1, got {c} and {focus}")
    pictures = x if x.dim() == 4 else x[None] if x.dim() == 3 else x[None, None]
    low, high = float(x.min()), float(x.max())
    if pictures.shape[1] == 3 and (low < 0 or high > 1):
        raise ArgumentError(f"map_or_image: expected a picture in [0, 1], got {low} to {high}")
    found = torch.stack([_saliency(one, patch, k, c, scales, focus, max_side, step) for one in pictures])
    return found if x.dim() == 4 else found[0]


def salient_relevance(
    model: nn.Module, x: Tensor, target: int | Tensor | None = None, rule: object = "z", **options: object
) -> Tensor:
    """The areas of a picture that a network looks at (arXiv:1712.08268): context-aware saliency of its relevance.

    The relevance of `lrp` is taken by its magnitude, scaled to [0, 1] over the picture, as a picture itself: three
    channels are red, green and blue, any other number is added up to grey.

    Args:
        model, x, target, rule: as of `lrp`; x is (B, C, H, W).
        options: of `context_aware_saliency`.

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        ShapeError, ArgumentError, Unsupported: as those do.
    """
    if x.dim() != 4:
        raise ShapeError(f"x: expected pictures (B, C, H, W), got {tuple(x.shape)}")
    relevance = lrp(model, x, target, rule).abs()
    if x.shape[1] != 3:
        relevance = relevance.sum(1, keepdim=True)
    return context_aware_saliency(torch.stack([_unit(one) for one in relevance]), **options)  # type: ignore[arg-type]


def _saliency(
    picture: Tensor, patch: int, k: int, c: float, scales: Sequence[float], focus: float, max_side: int, step: int
) -> Tensor:
    """(H, W) of one picture (1 or 3, H, W)."""
    size = picture.shape[1:]
    if bool((picture == picture[:, :1, :1]).all()):
        return picture.new_zeros(size)
    shrunk = min(1.0, max_side / max(size))
    lab = _resized(_lab(picture if len(picture) == 3 else _unit(picture).expand(3, -1, -1)), shrunk)
    found = []
    for r in scales:
        own, *smaller = (_patches(_resized(lab, r * part), patch, step) for part in (1, 0.5, 0.25))
        unlike = _unlike(own, [own, *smaller], k, c, lab.shape[1:])
        unlike = F.interpolate(unlike[None, None], lab.shape[1:], mode="bicubic")[0, 0].clamp(0, 1)
        found.append(unlike * (1 - _to_nearest(_unit(unlike) > focus)))
    mean = torch.stack(found).mean(0).float()
    return F.interpolate(mean[None, None], size, mode="bicubic")[0, 0].clamp(0, 1) if shrunk < 1 else mean


def _patches(picture: Tensor, side: int, step: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(n, numbers) patches around evenly spread centres, the centres (n, 2) as shares of the sides, and their grid."""
    sides = picture.shape[1:]
    grid = (-(-sides[0] // step), -(-sides[1] // step))
    rows, columns = (
        ((torch.arange(n, device=picture.device) + 0.5) * length / n - 0.5).round().long()
        for n, length in zip(grid, sides, strict=True)
    )
    around = F.pad(picture[None], (side // 2,) * 4, mode="replicate")[0].unfold(1, side, 1).unfold(2, side, 1)
    patches = around[:, rows][:, :, columns].permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    centres = torch.cartesian_prod((rows + 0.5) / sides[0], (columns + 0.5) / sides[1])
    return patches, centres, grid


def _unlike(own: tuple, others: list[tuple], k: int, c: float, size: Sequence[int]) -> Tensor:
    """1 - exp(-mean dissimilarity to the k most similar of the others), on the grid of the own patches."""
    patches, centres, grid = own
    shares = torch.tensor(size, device=patches.device) / max(size)
    # shifted, so that what is constant is exactly zero; in float64, for the difference of squares
    near, far = patches.double() - patches[0], torch.cat([one[0] for one in others]).double() - patches[0]
    here, there = centres * shares, torch.cat([one[1] for one in others]) * shares
    k, rows = min(k, len(far) - 1), max(1, _CHUNK // len(far))
    means = []
    for start in range(0, len(near), rows):
        part = near[start : start + rows]
        squares = part.square().sum(1)[:, None] + far.square().sum(1) - 2 * part @ far.T
        colour = (squares.clamp(min=0) / far.shape[1]).sqrt().float()
        d = colour / (1 + c * torch.cdist(here[start : start + rows], there))
        at = torch.arange(len(part), device=d.device)
        d[at, start + at] = torch.inf  # a patch is not one of the others
        means.append(d.topk(k, largest=False).values.mean(1))
    return (1 - torch.exp(-torch.cat(means))).view(grid)


def _to_nearest(foci: Tensor) -> Tensor:
    """(H, W) distance to the nearest focus in units of the longer side, at most 1; 0 where there are no foci.

    The square of the distance is a minimum over the column of a minimum over the row.
    """
    squares = torch.where(foci, 0.0, torch.inf)
    for _ in range(2):  # along each axis in turn
        at = torch.arange(squares.shape[1], device=foci.device, dtype=squares.dtype)
        steps = (at[:, None] - at).square()
        squares = torch.stack([(row + steps).amin(1) for row in squares]).T
    return squares.sqrt().div(max(foci.shape)).clamp(max=1) if bool(foci.any()) else torch.zeros_like(squares)


def _lab(picture: Tensor) -> Tensor:
    """(3, H, W) sRGB to L*, a*, b* of CIE 1976, each scaled to [0, 1]."""
    linear = torch.where(picture > 0.04045, ((picture + 0.055) / 1.055) ** 2.4, picture / 12.92)
    white = torch.einsum("xc,chw->xhw", torch.tensor(_XYZ, device=picture.device, dtype=picture.dtype), linear)
    f = torch.where(white > (6 / 29) ** 3, white.clamp(min=1e-6) ** (1 / 3), white / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f
    return torch.stack([(116 * y - 16) / 100, (500 * (x - y) + 128) / 255, (200 * (y - z) + 128) / 255])


def _resized(picture: Tensor, scale: float) -> Tensor:
    size = [max(2, round(scale * length)) for length in picture.shape[1:]]  # torch averages one column wrongly
    if scale == 1:
        return picture
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def _unit(x: Tensor) -> Tensor:
    """Scaled to [0, 1]; zeros where all values are the same but for rounding."""
    low, high = x.amin(), x.amax()
    constant = bool(high - low <= 1e-5 * x.abs().amax())  # a bicubic resize of a constant is this far from one
    return torch.zeros_like(x) if constant else (x - low) / (high - low)
