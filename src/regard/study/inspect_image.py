"""`inspect_image`: where a vision transformer looks in one picture, by layer, head and patch."""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, MissingExtra, Unsupported, require
from regard.probes.recorder import patch_size
from regard.sites import apply
from regard.study import models, subject
from regard.study.inspect_weights import Plan, Reduced, Reducer
from regard.study.inspected import Inspected
from regard.study.vision_models import Preprocessing

_PATTERN_BYTES = 6 * 2**20  # of the page, before base64
_SIDE = 672  # pixels of the picture on the page, about

#: what a head does for the most part, in the order in which it is decided; of the patches as queries
IMAGE_ROLES = {
    "itself": "30% of its attention or more stays on the patch itself",
    "row": "40% or more stays in the patch's row, and a good deal more than in its column",
    "column": "40% or more stays in the patch's column, and a good deal more than in its row",
    "class token": "30% or more goes to the tokens before the patches, such as the class token",
    "same for all": "40% or more of all attention goes to the same four patches",
    "nearby": "40% or more stays within two patches",
    "broad": "its entropy is 75% or more of the highest possible",
    "mixed": "none of these",
}
_THIRDS = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))


@dataclass(frozen=True)
class ImageUnit:
    """A head, or the mean over the heads of a layer (head None): means over the patches as queries.

    Attributes:
        entropy: of the weights of all tokens, in nats.
        distance: between query and key where both are patches, in patches.
        first: share on the tokens before the patches.
        near: share within two patches in each direction.
        same: of all attention, what goes to the four patches that get most.
        role: one of `IMAGE_ROLES`; none for a mean.
    """

    layer: int
    head: int | None
    entropy: float
    distance: float
    first: float
    near: float
    same: float
    role: str | None


@dataclass(frozen=True, eq=False)
class ImageInspection(Inspected):
    """What `inspect_image` returns.

    Attributes:
        model, source: where model and picture come from.
        picture: what the model saw of it, as JPEG.
        grid: rows and columns of patches.
        leading: number of tokens before them: class token, registers.
        cells: rows and columns of cells; each is one patch where the page has room for it, else a square of some.
        units: the heads of every layer, and after those its mean.
        patterns: (units, G, G), mean attention of the queries of a group to all keys of a group. Groups are the
            leading tokens, each by itself, and then the cells, row by row.
        regions: names of what `flow` is about.
        flow: (units, R, R), the same between the leading tokens and the regions of the picture.
        received: (units, G), the mean share that all tokens give to the tokens of a group.
    """

    model: str
    source: str
    picture: bytes
    grid: tuple[int, int]
    leading: int
    cells: tuple[int, int]
    units: list[ImageUnit]
    patterns: Tensor
    regions: list[str]
    flow: Tensor
    received: Tensor

    ROLES: ClassVar[Mapping[str, str]] = IMAGE_ROLES


def inspect_image(
    model: Any = "vit-s",
    *,
    image: Any = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageInspection:
    """Run a vision transformer once over a picture and keep where it looked.

        from regard.study.inspect_image import inspect_image
        inspect_image("vit-s", image=Path("cat.jpg")).report("inspect.html")

    Args:
        model: a name or path as `regard.study.models.load_vision` takes it, or a loaded (model, `Preprocessing`), also
            of timm.
        image: the `Path` of a picture, or a picture: PIL's, or a uint8 array (H, W, 3). If None, a photograph that
            comes with scikit-image or scikit-learn.
        device, dtype: where and as what to load the model; a model that is loaded stays as it is.
        on_progress: called with layers done and their number.

    Raises:
        ArgumentError: an unknown model, or a picture that cannot be read.
        ShapeError: an array that is no picture.
        Unsupported: attention that cannot be reached, or is not over one grid of at least three by three patches.
        MissingExtra: an optional package is needed and not there.
    """
    source, picture = _picture(image)
    network, preprocess, label = _network(model, device, dtype)
    weight = next(network.parameters())
    pixels = preprocess(picture).to(weight)
    height, width = (pixels.shape[-2] // _patch(network)[0], pixels.shape[-1] // _patch(network)[1])
    if min(height, width) < 3:
        raise Unsupported(f"inspecting a grid of {height} by {width} patches: expected at least 3 by 3")

    def planned(length: int, layers: int, units: int) -> Plan:
        leading = length - height * width
        if not 0 <= leading < 17:
            raise Unsupported(
                f"inspecting {type(network).__name__}: expected {height} by {width} patches and at most a few tokens "
                f"before them, got {length} tokens"
            )
        together = 1
        while units * (leading + _cells(height, together) * _cells(width, together)) ** 2 > _PATTERN_BYTES:
            together += 1
        cells = _tiled(height, width, lambda row, column: (row // together, column // together))
        thirds = _tiled(height, width, lambda row, column: (3 * row // height, 3 * column // width))
        before = torch.arange(leading)
        return Plan(
            groups=torch.cat([before, leading + cells]),
            parts=torch.cat([before.clamp(max=1), min(leading, 2) + thirds]),
            factors=_factors(height, width, leading),
        )

    reducer = Reducer(planned=planned, on_progress=on_progress)
    with subject.evaluating(network), torch.inference_mode(), apply(network, reducer):
        network(**{network.main_input_name: pixels}) if hasattr(network, "main_input_name") else network(pixels)
    found = reducer.reduced
    length, groups = len(found.plan.groups), found.plan.groups
    leading = length - height * width
    columns = int(groups[leading + width - 1]) - leading + 1
    inside = F.one_hot(groups).float()
    return ImageInspection(
        model=label,
        source=source,
        picture=_jpeg(preprocess, picture),
        grid=(height, width),
        leading=leading,
        cells=((int(groups[-1]) - leading + 1) // columns, columns),
        units=list(_units(found, leading)),
        patterns=found.patterns,
        regions=[*("class token", "other tokens")[: min(leading, 2)], *(name for row in _THIRDS for name in row)],
        flow=found.flow,
        received=found.received @ inside / length,
    )


def _picture(image: Any) -> tuple[str, Any]:
    """Where the picture comes from, and the picture."""
    if isinstance(image, str | Path):
        pil = require("PIL.Image", "read pictures")
        try:
            with pil.open(image) as opened:
                turned = require("PIL.ImageOps", "read pictures").exif_transpose(opened)
                return str(image), turned.convert("RGB")
        except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or "it is no picture that Pillow reads"
            raise ArgumentError(f"image: cannot read {str(image)!r}: {reason}") from error
    if image is not None:
        return "a given picture", image
    if find_spec("skimage") is not None:
        return "a photograph of an astronaut (scikit-image)", require("skimage.data", "show a picture").astronaut()
    if find_spec("sklearn") is not None:
        return "a photograph of China (scikit-learn)", require("sklearn.datasets", "show one").load_sample_image(
            "china.jpg"
        )
    raise MissingExtra(
        "without scikit-image and scikit-learn, which bring photographs, `image` must be given", name="skimage"
    )


def _network(model: Any, device: str | torch.device, dtype: str | torch.dtype) -> tuple[Any, Preprocessing, str]:
    """The model, how it wants its pictures, and what to call it."""
    if isinstance(model, models.VisionModel):
        return model.network, model.preprocess, model.label
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        if isinstance(model[1], Preprocessing):
            name = getattr(getattr(model[0], "config", None), "name_or_path", "") or type(model[0]).__name__
            return *model, name
    elif isinstance(model, str | Path):
        loaded = models.load_vision(model, device=device, dtype=dtype)
        return loaded.network, loaded.preprocess, loaded.label
    raise ArgumentError(f"model must be a name, a path or (model, Preprocessing), got {type(model).__name__}")


def _patch(network: Any) -> tuple[int, int]:
    """Height and width of a patch."""
    size = patch_size(network)
    if size is None:
        raise Unsupported(f"inspecting {type(network).__name__}: it does not say the size of its patches")
    return size


def _jpeg(preprocess: Preprocessing, picture: Any) -> bytes:
    """What the model sees of the picture, at the page's size."""
    times = max(1, round(_SIDE / preprocess.size))
    seen = preprocess.restore(replace(preprocess, size=times * preprocess.size)(picture))[0]
    pixels = (seen * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    require("PIL.Image", "write pictures").fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def _cells(length: int, together: int) -> int:
    return -(-length // together)


def _tiled(height: int, width: int, of: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """(patches,) the tile of each patch, tiles being numbered row by row."""
    tiles = [of(row, column) for row in range(height) for column in range(width)]
    columns = 1 + max(column for _, column in tiles)
    return torch.tensor([row * columns + column for row, column in tiles])


def _factors(height: int, width: int, leading: int) -> dict[str, Tensor]:
    """What the weights (N, N) are multiplied with, and summed, for a mean over the patches as queries."""
    n = leading + height * width
    places = torch.cartesian_prod(torch.arange(float(height)), torch.arange(float(width)))
    gap = (places[:, None] - places).abs()

    def between_patches(values: Tensor) -> Tensor:
        return F.pad(values.float(), (leading, 0, leading, 0)) / (height * width)

    rows, columns = gap.unbind(-1)
    first = torch.zeros(n, n)
    first[leading:, :leading] = 1 / (height * width)
    return {
        "itself": between_patches(gap.sum(-1) == 0),
        "row": between_patches(rows == 0),
        "column": between_patches(columns == 0),
        "near": between_patches(gap.amax(-1) <= 2),
        "patches": between_patches(torch.ones_like(rows)),
        "distance": between_patches(gap.square().sum(-1).sqrt()),
        "first": first,
    }


def _units(found: Reduced, leading: int) -> Iterator[ImageUnit]:
    highest = math.log(len(found.plan.groups))
    most = (found.received[:, leading:] / len(found.plan.groups)).topk(4).values.sum(-1)
    for at, (layer, head) in enumerate(found.units):
        known = {name: float(values[at]) for name, values in found.figures.items()}
        entropy, same = float(found.entropy[at]), float(most[at])
        yield ImageUnit(
            layer=layer,
            head=head,
            entropy=round(entropy, 4),
            distance=round(known["distance"] / max(known["patches"], 1e-12), 4),
            first=round(known["first"], 4),
            near=round(known["near"], 4),
            same=round(same, 4),
            role=None if head is None else image_role({**known, "same": same}, entropy / highest),
        )


def image_role(shares: Mapping[str, float], entropy: float) -> str:
    """One of `IMAGE_ROLES`, from the shares that it speaks of and the entropy as part of the highest."""
    decided = {
        "itself": shares["itself"] >= 0.3,
        "row": shares["row"] >= max(0.4, 1.5 * shares["column"]),
        "column": shares["column"] >= max(0.4, 1.5 * shares["row"]),
        "class token": shares["first"] >= 0.3,
        "same for all": shares["same"] >= 0.4,
        "nearby": shares["near"] >= 0.4,
        "broad": entropy >= 0.75,
    }
    return next((role for role, holds in decided.items() if holds), "mixed")
