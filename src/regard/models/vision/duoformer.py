"""DuoFormer (arXiv:2506.12982): a CNN whose stages are read together, patch by patch."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly
from regard.layers.grid import BatchNorm2d, Conv2d
from regard.mechanisms.grid.multi_scale import DuoFormerHead, multi_scale_tokens, own_names
from regard.models.vision.resnet import RESNETS, ResNet

#: strides of a CNN's last stages over that of its last
_FACTORS = (8, 4, 2, 1)


class ChannelToken(nn.Module):
    """A token per patch from all channels of the four stages: maps (B, f·h, f·w, C_i) to (B, h·w, 1, dim).

    A stage f times as fine as the patches is halved by 3×3 convolutions and, the last time, by max pooling; four
    3×3 convolutions with batch norm and ReLU mix the channels.
    """

    def __init__(self, channels: Sequence[int], dim: int):
        super().__init__()
        self.shrink = nn.ModuleList(
            nn.Sequential(*(Conv2d(c, c, 3, 2) for _ in range(f.bit_length() - 2)))
            for c, f in zip(channels, _FACTORS, strict=True)
        )
        layers: list[nn.Module] = []
        for before in (sum(channels), dim, dim, dim):
            layers += [Conv2d(before, dim, 3), BatchNorm2d(dim), nn.ReLU()]
        self.mix = nn.Sequential(*layers)
        for conv in self.shrink.modules():
            if isinstance(conv, Conv2d):
                _kaiming(conv)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        parts = []
        for x, shrink, f in zip(features, self.shrink, _FACTORS, strict=True):
            x = shrink(x)
            parts.append(F.max_pool2d(x.movedim(-1, 1), 2).movedim(1, -1) if f > 1 else x)
        return self.mix(torch.cat(parts, -1)).flatten(1, 2).unsqueeze(2)


class DuoFormer(nn.Module, PyTorchModelHubMixin):
    """Images (B, in_chans, 32·h, 32·w) to logits (B, num_classes), of the one size that has ``grid`` patches.

    Each of the last stages of a CNN is projected to ``dim`` channels; a patch has its tokens from all of them and one
    that gathers the others (`multi_scale_tokens`, `DuoFormerHead`).

    Args:
        backbone: "resnet18", "resnet34", "resnet50" or "resnet101"; or a module or function that gives the feature
            maps (B, C, H, W) of its stages, the finest first, the last four at strides 4, 8, 16 and 32: a `Backbone`
            or a model of timm, with ``features_only``.
        channels: of the last four feature maps; known of a `Backbone` and of timm's models.
        num_classes: outputs; 0 for the class token.
        in_chans: channels of the image, for a backbone by name.
        dim, depth, num_heads, mlp_ratio, init_values, patch_block, final_norm: see `DuoFormerHead`.
        scales: how many stages are read, from the last one on.
        scale_token: what gathers the others; "random", one learned vector, or "channel", made from all four stages
            by convolutions (`ChannelToken`).
        grid: patches down and across.
        freeze_backbone: the CNN learns nothing: its weights have no gradients, its batch norms keep their statistics.

    Raises:
        ShapeError: the images have another size, or the feature maps do not fit.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "duoformer-r18": {"backbone": "resnet18"},
        "duoformer-r50": {"backbone": "resnet50"},
    }

    def __init__(
        self,
        backbone: str | Callable[[Tensor], Sequence[Tensor]] = "resnet50",
        channels: Sequence[int] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        scales: int = 4,
        scale_token: Literal["random", "channel"] = "random",
        grid: tuple[int, int] = (7, 7),
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        patch_block: Literal["plain", "transformer"] = "plain",
        final_norm: bool = False,
        freeze_backbone: bool = False,
    ):
        super().__init__()
        if not 1 <= scales <= len(_FACTORS):
            raise ArgumentError(f"scales: expected 1 to {len(_FACTORS)}, got {scales}")
        if scale_token not in ("random", "channel"):
            raise ArgumentError(f"scale_token: expected 'random' or 'channel', got {scale_token!r}")
        if len(grid) != 2 or min(grid) < 1:
            raise ArgumentError(f"grid: expected (height, width) in patches, got {grid!r}")
        if isinstance(backbone, str):
            if backbone not in RESNETS:
                raise ArgumentError(f"backbone: expected a module or one of {', '.join(RESNETS)}, got {backbone!r}")
            settings: dict[str, Any] = {**RESNETS[backbone], "num_classes": 0, "in_chans": in_chans}
            backbone = ResNet(features_only=True, **settings)
        found = _channels(backbone) if channels is None else tuple(channels)
        if len(found) < len(_FACTORS):
            raise ArgumentError(f"channels: expected those of {len(_FACTORS)} feature maps, got {found}")
        self.backbone, self.channels, self.grid = backbone, tuple(found[-len(_FACTORS) :]), (grid[0], grid[1])
        self.dim, self.scales, self.freeze_backbone = dim, scales, freeze_backbone
        self.projections = nn.ModuleList(nn.Linear(c, dim) for c in self.channels[-scales:])
        for projection in self.projections:
            _kaiming(projection)
        self.scale_token = self.channel_token = None
        if scale_token == "random":
            self.scale_token = nn.Parameter(torch.empty(1, 1, 1, dim))
            nn.init.normal_(self.scale_token, std=0.036)
        else:
            self.channel_token = ChannelToken(self.channels, dim)
        patches = grid[0] * grid[1]
        self.head = DuoFormerHead(
            *(dim, depth, num_heads, scales, patches, mlp_ratio, init_values, num_classes),
            patch_block=patch_block,
            final_norm=final_norm,
        )
        if freeze_backbone and isinstance(backbone, nn.Module):
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DuoFormer":
        super().train(mode)
        if self.freeze_backbone and isinstance(self.backbone, nn.Module):
            self.backbone.eval()
        return self

    def tokens(self, images: Tensor) -> Tensor:
        """What the head reads: (B, P, 1 + S, dim), the scale token first, then those of the coarsest stage."""
        if images.dim() != 4:
            raise ShapeError(f"images: expected (B, C, H, W), got {tuple(images.shape)}")
        features = self.backbone(images)
        count = len(_FACTORS)
        if not isinstance(features, list | tuple) or len(features) < count:
            raise ShapeError(f"backbone: expected a list of {count} feature maps, got {_shapes(features)}")
        h, w = self.grid
        features = features[-count:]
        expected = [(c, f * h, f * w) for c, f in zip(self.channels, _FACTORS, strict=True)]
        if [tuple(x.shape[1:]) for x in features] != expected:
            raise ShapeError(
                f"images: expected feature maps {expected} for {h} x {w} patches (grid), got {_shapes(features)}"
                f" from images {tuple(images.shape)}"
            )
        maps = [x.movedim(1, -1) for x in features]
        projected = [p(x) for p, x in zip(self.projections, maps[-self.scales :], strict=True)]
        x = multi_scale_tokens(projected, self.grid)
        if self.channel_token is not None:
            first = self.channel_token(maps)
        else:
            assert self.scale_token is not None
            first = self.scale_token.expand(*x.shape[:2], -1, -1)
        return torch.cat([first, x], 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(images))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        depth: int,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_classes: int = 2,
        num_layers: int = 4,
        num_patches: int = 49,
        mlp_ratio: float = 4.0,
        proj_dim: int = 768,
        freeze_backbone: bool = True,
        backbone: str = "r50",
        scale_token: Literal["random", "channel"] = "random",
        **others: Any,
    ) -> "DuoFormer":
        """Weights and arguments of the published ``MyModel_no_extra_params`` (``init_values`` is not used there)."""
        others.pop("init_values", None)
        if backbone not in ("r18", "r50") or not others.pop("patch_attn", True) or any(others.values()):
            raise Unsupported(
                f"only backbones r18 and r50, with patch attention, without dropout; got {backbone}, {others}"
            )
        side = int(num_patches**0.5)
        if embed_dim != proj_dim or side**2 != num_patches:
            raise Unsupported(
                f"embed_dim {embed_dim} must equal proj_dim {proj_dim}, num_patches {num_patches} a square"
            )
        model = cls(
            {"r18": "resnet18", "r50": "resnet50"}[backbone],
            *(None, num_classes, 3, embed_dim, depth, num_heads, num_layers, scale_token, (side, side), mlp_ratio),
            freeze_backbone=freeze_backbone,
        )
        former, cnn = "vision_transformer.", "resnet_projector."
        state = {n: t for n, t in state_dict.items() if not n.startswith(former)}
        inner = {n.removeprefix(former): t for n, t in state_dict.items() if n.startswith(former)}
        state |= {f"head.{name}": tensor for name, tensor in own_names(inner).items()}
        assert isinstance(model.backbone, ResNet)
        rename = {"channel_token": "scale_token"}
        numbers = {"conv1": "0", "bn1": "1", **{f"layer{i + 1}": str(i + 4) for i in range(4)}}
        for old, new in model.backbone.published_names().items():
            first, dot, rest = old.partition(".")
            rename[f"{cnn}{numbers[first]}{dot}{rest}"] = f"backbone.{new}"
        for i in range(4):
            if i >= 4 - num_layers:
                rename[f"projection.proj_heads{i}"] = f"projections.{i - 4 + num_layers}"
            rename |= {f"chann_proj{i + 1}.conv{j + 1}": f"channel_token.shrink.{i}.{j}" for j in range(2)}
            rename |= {
                f"chann_proj_all.nConvs.{i}.{kind}": f"channel_token.mix.{3 * i + j}"
                for j, kind in enumerate(("conv", "norm"))
            }
        load_strictly(model, state, rename)
        return model


def _channels(backbone: Any) -> tuple[int, ...]:
    """Of the feature maps of a `Backbone` or of timm's models."""
    if (found := getattr(backbone, "channels", None)) is None and (info := getattr(backbone, "feature_info", None)):
        found = info.channels()
    if found is None:
        raise ArgumentError(f"channels: a {type(backbone).__name__} does not say what its feature maps have")
    return tuple(found)


def _shapes(features: Any) -> str:
    if isinstance(features, Tensor):
        return str(tuple(features.shape))
    return str([tuple(x.shape) for x in features]) if isinstance(features, list | tuple) else type(features).__name__


def _kaiming(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear | Conv2d)
    nn.init.kaiming_normal_(layer.weight)
    assert layer.bias is not None
    nn.init.normal_(layer.bias, std=1e-6)
