"""Efficient local attention (ELA): an image is gated by its row and column profiles."""

from math import gcd
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.mechanisms.grid.base import GridMechanism

Version = Literal["t", "b", "s", "l"]

#: kernel size, groups of the convolution (0 for one per channel, else channels of a group), groups of the norm
VERSIONS: dict[str, tuple[int, int, int]] = {"t": (5, 0, 32), "b": (7, 0, 16), "s": (5, 8, 16), "l": (7, 8, 16)}


class EfficientLocalAttention(GridMechanism):
    """Two profiles say which rows and which columns matter (arXiv:2403.01123).

        a_h = σ(GN(conv(mean of each row)))        a_w = σ(GN(conv(mean of each column)))        y = x ∘ a_h ∘ a_w

    x (B, H, W, C) to the same, at any size; exact, noncausal. Both directions share the convolution and the norm, whose
    statistics are each direction's own, so turning the image turns the output. It replaces x rather than being added to
    it: put it after the last convolution of a residual branch, see `insert_ela`. Where it starts, gates are about 1/2.

    No code was published. The paper's versions are: "t" and "b" with one filter per channel, "s" and "l" with groups of
    8 channels; kernels of 5 ("t", "s") or 7; 32 ("t") or 16 groups in the norm.

    Args:
        dim: C.
        kernel_size: of the 1-D convolution, odd.
        conv_groups: of the convolution, or "depthwise" for one per channel.
        norm_groups: of the group norm, dividing C.
        version: sets the three above.
        fit_groups: take the largest common divisor with C where ``norm_groups`` does not divide it.
        scale_init: learn a factor of the output, which begins there; 4 begins near the identity, for trained networks.
    """

    cost: ClassVar[str] = "O(N C), N = H W"

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        conv_groups: int | Literal["depthwise"] = "depthwise",
        norm_groups: int = 16,
        version: Version | None = None,
        fit_groups: bool = False,
        scale_init: float | None = None,
    ):
        super().__init__()
        if version is not None:
            if version not in VERSIONS:
                raise ArgumentError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
            kernel_size, group, norm_groups = VERSIONS[version]
            if group and dim % group:
                raise ArgumentError(f"dim: expected a multiple of {group} for version {version!r}, got {dim}")
            conv_groups = dim // group if group else "depthwise"
        groups = dim if conv_groups == "depthwise" else conv_groups
        if not isinstance(groups, int) or groups < 1 or dim % groups:
            raise ArgumentError(f"conv_groups: expected a divisor of dim {dim} or 'depthwise', got {conv_groups!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ArgumentError(f"kernel_size: expected an odd number, got {kernel_size}")
        if norm_groups < 1 or (dim % norm_groups and not fit_groups):
            raise ArgumentError(f"norm_groups: expected a divisor of dim {dim}, or fit_groups=True, got {norm_groups}")
        self.dim = dim
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(gcd(dim, norm_groups), dim)
        self.scale = None if scale_init is None else nn.Parameter(torch.tensor(float(scale_init)))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.gates(x)
        y = x * rows * columns
        return y if self.scale is None else y * self.scale

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows (B, H, 1, C) and of the columns (B, 1, W, C), from 0 to 1."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        return self._gate(x.mean(2)).unsqueeze(2), self._gate(x.mean(1)).unsqueeze(1)

    def _gate(self, profile: Tensor) -> Tensor:
        """(B, N, C) to the same; torch's own module would refuse a single value per group."""
        norm = self.norm
        z = torch.group_norm(self.conv(profile.mT), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return z.sigmoid().mT

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, norm_groups: int = 16, **_: Any
    ) -> "EfficientLocalAttention":
        """Weights ``conv.weight``, ``gn.weight`` and ``gn.bias`` of the known ports, whose shapes say the rest."""
        if "conv.weight" not in state_dict:
            raise ArgumentError(f"state_dict: expected conv.weight, got {', '.join(state_dict) or 'nothing'}")
        dim, per_group, kernel_size = state_dict["conv.weight"].shape
        module = cls(dim, kernel_size, dim // per_group, norm_groups)
        load_strictly(module, state_dict, {"gn": "norm"})
        return module


class ChannelsFirst(nn.Module):
    """A module for (B, H, W, C) in a network of (B, C, H, W)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.movedim(1, -1)).movedim(-1, 1)


def insert_ela(model: nn.Module, where: Literal["bottleneck", "inverted"] = "bottleneck", **config: Any) -> nn.Module:
    """Put `EfficientLocalAttention` into every block of a network (B, C, H, W) as torchvision builds it, in place.

    Args:
        model: the network.
        where: "bottleneck": in blocks with ``conv1, bn1, conv2, bn2 …`` (ResNet) after the last norm, before the
            residual; "inverted": in blocks with ``use_res_connect`` and a ``conv`` list (MobileNetV2), after the
            depthwise convolution.
        config: arguments of `EfficientLocalAttention` but ``dim``.

    Raises:
        ArgumentError: there is no such block, or the arguments do not fit its channels.
    """
    if where not in ("bottleneck", "inverted"):
        raise ArgumentError(f"where: expected bottleneck or inverted, got {where!r}")
    found = _bottlenecks(model) if where == "bottleneck" else _inverted(model)
    if not found:
        raise ArgumentError(f"model: expected blocks of the kind {where!r}, found none in {type(model).__name__}")
    made = []
    for parent, _, dim in found:
        weight = next(parent.parameters())
        made.append(EfficientLocalAttention(dim, **config).to(weight.device, weight.dtype))
    for (parent, name, _), layer in zip(found, made, strict=True):
        setattr(parent, name, nn.Sequential(getattr(parent, name), ChannelsFirst(layer)))
    return model


def _bottlenecks(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Parents, names and channels of the last norms of residual blocks."""
    found = []
    for block in model.modules():
        norms = [name for name in ("bn2", "bn3") if isinstance(getattr(block, name, None), nn.BatchNorm2d)]
        if norms and hasattr(block, "conv1") and hasattr(block, "conv2"):
            found.append((block, norms[-1], getattr(block, norms[-1]).num_features))
    return found


def _inverted(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """The same of the depthwise layers of inverted residuals."""
    found: list[tuple[nn.Module, str, int]] = []
    for block in model.modules():
        layers = getattr(block, "conv", None)
        if not hasattr(block, "use_res_connect") or not isinstance(layers, nn.Sequential):
            continue
        for name, layer in layers.named_children():
            convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
            if convs:
                found.append((layers, name, convs[0].out_channels))
    return found
