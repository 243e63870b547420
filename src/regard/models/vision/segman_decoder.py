"""SegMAN's decoder (arXiv:2412.11890), which scans three resolutions at once, and the segmentation network."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN
from regard.layers.grid import BatchNorm2d, Conv2d
from regard.mechanisms.grid.lass import with_batch_counts
from regard.mechanisms.grid.selective import SelectiveScan2d, published_scan
from regard.models.vision.segman import SegMANBlock, SegMANEncoder, published_arguments


class ConvBNReLU(nn.Sequential):
    """A 1×1 convolution, or one that shrinks the grid by its stride, with norm and ReLU; (B, H, W, C)."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int = 1, stride: int = 1):
        conv: nn.Module = ConvBN(dim_in, dim_out)
        if stride > 1:
            conv = nn.Sequential()
            conv.add_module("conv", Conv2d(dim_in, dim_out, kernel_size, stride, padding=1, bias=False))
            conv.add_module("bn", BatchNorm2d(dim_out))
        super().__init__(conv, nn.ReLU())


class SegMANDecoder(nn.Module, PyTorchModelHubMixin):
    """Four feature maps (B, C_i, H / s_i, W / s_i), strides 4, 8, 16, 32, to logits (B, num_classes, H / 8, W / 8).

        f_i = W_i c_i at the size of c_2        x = ConvBNReLU(f_4, f_3, f_2)
        m = block(x, half of x, quarter of x, all unshuffled to a quarter of the sides and reduced to ``channels``)
        y = W ConvBNReLU(ConvBNReLU(x), ConvBNReLU(mean x), m, g + f_2, g + f_3, g + f_4)        g = ConvBNReLU(m)

    The block is a `SegMANBlock` around a `SelectiveScan2d` of the three resolutions side by side. The first map is not
    used. The sides of the second must be multiples of 4.

    Args:
        in_channels: of the four maps.
        channels: of x.
        feat_dim: of f_i.
        num_classes: outputs.
        drop_rate: of channels, before the last layer.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 128,
        feat_dim: int = 192,
        num_classes: int = 150,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        if len(in_channels) != 4:
            raise ArgumentError(f"in_channels: expected those of four maps, got {in_channels}")
        self.in_channels, self.num_classes = tuple(in_channels), num_classes
        self.linear = nn.ModuleList(nn.Linear(dim, feat_dim) for dim in in_channels[1:])
        self.fuse = ConvBNReLU(3 * feat_dim, channels)
        self.halve = ConvBNReLU(channels, 2 * channels, 3, 2)
        self.shrink = ConvBNReLU(channels, 4 * channels, 5, 4)
        self.reduce = nn.ModuleList(ConvBNReLU(each * channels, channels) for each in (16, 8, 4))
        self.block = SegMANBlock(SelectiveScan2d(3 * channels))
        self.short, self.pooled = ConvBNReLU(channels, channels), ConvBNReLU(channels, channels)
        self.scanned = ConvBNReLU(3 * channels, feat_dim)
        self.join = ConvBNReLU(5 * channels + 3 * feat_dim, channels)
        self.dropout = nn.Dropout2d(drop_rate)
        self.head = nn.Linear(channels, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits at the size of the second map.

        Raises:
            ShapeError: not the four maps, or sides that are no multiples of 4.
        """
        self._check(features)
        grid = features[1].shape[2:]
        near, middle, far = (layer(c.movedim(1, -1)) for layer, c in zip(self.linear, features[1:], strict=True))
        middle, far = _resized(middle, grid), _resized(far, grid)
        x = self.fuse(torch.cat([far, middle, near], -1))
        scales = [_unshuffled(x, 4), _unshuffled(self.halve(x), 2), self.shrink(x)]
        scanned = self.block(torch.cat([reduce(t) for reduce, t in zip(self.reduce, scales, strict=True)], -1))
        scanned = _resized(scanned, grid)
        mean = self.pooled(x.mean((1, 2), keepdim=True)).expand_as(x)
        g = self.scanned(scanned)
        y = self.join(torch.cat([self.short(x), mean, scanned, near + g, middle + g, far + g], -1))
        return self.head(self.dropout(y.movedim(-1, 1)).movedim(1, -1)).movedim(-1, 1)

    def _check(self, features: Sequence[Tensor]) -> None:
        found = [tuple(t.shape) for t in features]
        fits = len(found) == 4 and all(len(s) == 4 and s[1] == c for s, c in zip(found, self.in_channels, strict=True))
        if not fits:
            raise ShapeError(f"features: expected (B, C, h, w) with {self.in_channels} channels, got {found}")
        if 0 in found[1] or found[1][2] % 4 or found[1][3] % 4:
            raise ShapeError(f"features: expected sides of the second map in multiples of 4, got {found[1][2:]}")

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_channels: Sequence[int],
        channels: int,
        feat_proj_dim: int,
        num_classes: int,
        dropout_ratio: float = 0.1,
        align_corners: bool = False,
        interpolate_mode: str = "bilinear",
        **_: Any,
    ) -> "SegMANDecoder":
        """Weights and arguments of the published ``SegMANDecoder``.

        Raises:
            Unsupported: ``align_corners``, which no published model has.
        """
        if align_corners or interpolate_mode != "bilinear":
            raise Unsupported(f"align_corners, interpolate_mode: only False and 'bilinear', got {align_corners}")
        model = cls(in_channels, channels, feat_proj_dim, num_classes, dropout_ratio)
        rename = {"conv_seg": "head", "vssm": "block", "vssm.token_mixer": "block.mixer"}
        modules = {"linear_fuse": "fuse", "conv_downsample_2": "halve", "conv_downsample_4": "shrink"}
        modules |= {"short_path": "short", "image_pool.1": "pooled", "proj_out": "scanned", "cat": "join"}
        for i in range(3):
            rename |= {f"linear_c{i + 2}.proj": f"linear.{i}"}
            modules |= {f"reduce_channels.{i}": f"reduce.{2 - i}"}
        rename |= {old: f"{new}.0" for old, new in modules.items()}
        load_strictly(model, with_batch_counts(published_scan(dict(state_dict), "vssm.token_mixer.")), rename)
        return model


class SegMAN(nn.Module, PyTorchModelHubMixin):
    """Images (B, in_chans, H, W) to logits (B, num_classes, H / 8, W / 8): `SegMANEncoder` and `SegMANDecoder`.

    Args:
        num_classes: outputs.
        channels, feat_dim, drop_rate: of the decoder.
        encoder: arguments of the encoder.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "segman-tiny": {
            "channels": 128,
            "feat_dim": 192,
            "encoder": SegMANEncoder.sizes["segman-encoder-tiny"],
        },
        "segman-small": {
            "channels": 144,
            "feat_dim": 288,
            "encoder": SegMANEncoder.sizes["segman-encoder-small"],
        },
        "segman-base": {
            "channels": 180,
            "feat_dim": 320,
            "encoder": SegMANEncoder.sizes["segman-encoder-base"],
        },
        "segman-large": {
            "channels": 224,
            "feat_dim": 432,
            "encoder": SegMANEncoder.sizes["segman-encoder-large"],
        },
    }

    def __init__(
        self,
        num_classes: int = 150,
        channels: int = 144,
        feat_dim: int = 288,
        drop_rate: float = 0.1,
        encoder: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.encoder = SegMANEncoder(**{**(encoder or {}), "features_only": True})
        self.decoder = SegMANDecoder(self.encoder.channels, channels, feat_dim, num_classes, drop_rate)
        self.in_chans, self.num_classes = self.encoder.in_chans, num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes, H / 8, W / 8).

        Raises:
            ShapeError: not (B, in_chans, H, W), or sides that are no multiples of 32.
        """
        if images.dim() == 4 and (images.shape[2] % 32 or images.shape[3] % 32):
            raise ShapeError(f"images: expected sides in multiples of 32, got {tuple(images.shape[2:])}")
        return self.decoder(self.encoder(images))

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, encoder: Mapping[str, Any], decoder: Mapping[str, Any]
    ) -> "SegMAN":
        """Weights of the published segmentation networks, with the arguments of their backbone and decode head.

        Raises:
            ArgumentError: weights are missing, left over or of other shapes.
        """
        parts: dict[str, dict[str, Tensor]] = {"backbone.": {}, "decode_head.": {}}
        for name, tensor in state_dict.items():
            prefix = next((p for p in parts if name.startswith(p)), None)
            if prefix is None:
                raise ArgumentError(f"state_dict: expected names of {' and '.join(parts)}, got {name}")
            parts[prefix][name.removeprefix(prefix)] = tensor
        body = SegMANEncoder.from_official(parts["backbone."], **encoder)
        head = SegMANDecoder.from_official(parts["decode_head."], **{"in_channels": body.channels, **decoder})
        sizes = (decoder["num_classes"], decoder["channels"], decoder["feat_proj_dim"])
        model = cls(*sizes, decoder.get("dropout_ratio", 0.1), published_arguments(**encoder))
        model.encoder, model.decoder = body, head
        return model


def _resized(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Bilinear, (B, h, w, C) to (B, *grid, C)."""
    if tuple(x.shape[1:3]) == tuple(grid):
        return x
    return F.interpolate(x.movedim(-1, 1), tuple(grid), mode="bilinear", align_corners=False).movedim(1, -1)


def _unshuffled(x: Tensor, factor: int) -> Tensor:
    """(B, H, W, C) to (B, H / factor, W / factor, C · factor²), the channels of one another's neighbours together."""
    return F.pixel_unshuffle(x.movedim(-1, 1), factor).movedim(1, -1)
