"""ResNet (arXiv:1512.03385), a convolutional network beneath others."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, Unsupported
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.models.vision.backbone import Backbone, check_stages
from regard.models.vision.halonet import Bottleneck, MaxPool

#: arguments of the usual networks
RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"dims": (64, 128, 256, 512), "depths": (2, 2, 2, 2), "bottleneck": False},
    "resnet34": {"dims": (64, 128, 256, 512), "depths": (3, 4, 6, 3), "bottleneck": False},
    "resnet50": {"dims": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3)},
    "resnet101": {"dims": (256, 512, 1024, 2048), "depths": (3, 4, 23, 3)},
}


class BasicBlock(nn.Module):
    """``ReLU(shortcut(x) + BN(W2 ReLU(BN(W1 x))))`` with 3×3 convolutions; (B, H, W, C) at a stride."""

    def __init__(self, dim_in: int, dim: int, stride: int, drop_path: float = 0.0):
        super().__init__()
        same = dim_in == dim and stride == 1
        self.shortcut = nn.Identity() if same else ConvBN(dim_in, dim, stride=stride)
        self.conv1, self.conv2 = ConvBN(dim_in, dim, 3, stride), ConvBN(dim, dim, 3)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.drop_path(self.conv2(F.relu(self.conv1(x)))))


class ResNet(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A 7×7 convolution and max pooling (stride 4), four stages of residual blocks and the mean over the image. Blocks
    that shrink the image do so in a 3×3 convolution, as torchvision's and timm's do.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths: of each stage.
        bottleneck: blocks 1×1, 3×3, 1×1 with a quarter of the channels inside, else two 3×3.
        stem_dim: channels of the stem.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        stem_dim: int = 64,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        check_stages(len(dims), depths=depths)
        if bottleneck and any(dim % 4 for dim in dims):
            raise ArgumentError(f"dims: bottlenecks need multiples of 4, got {tuple(dims)}")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(len(dims)))
        self.bottleneck, self.features_only = bottleneck, features_only
        self.stem = nn.Sequential(ConvBN(in_chans, stem_dim, 7, 2), nn.ReLU(), MaxPool())
        self.stages = nn.ModuleList()
        before = stem_dim
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates):
                stride = 2 if i and not j else 1
                blocks.append(
                    Bottleneck(before, dims[i], stride, dims[i] // 4, None, drop_path=rate)
                    if bottleneck
                    else BasicBlock(before, dims[i], stride, rate)
                )
                before = dims[i]
            self.stages.append(nn.Sequential(*blocks))
        self.fc = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        for layer in self.modules():
            if isinstance(layer, Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((1, 2)))

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, layers: Sequence[int], block: str = "Bottleneck", num_classes: int = 1000
    ) -> "ResNet":
        """torchvision's ``ResNet``; ``block`` is the name of the class of its blocks."""
        if block not in ("BasicBlock", "Bottleneck"):
            raise Unsupported(f"block: only BasicBlock and Bottleneck, got {block!r}")
        dims = tuple(64 * 2**i * (4 if block == "Bottleneck" else 1) for i in range(len(layers)))
        model = cls(num_classes, dims=dims, depths=layers, bottleneck=block == "Bottleneck")
        load_strictly(model, state_dict, model.published_names())
        return model

    def published_names(self) -> dict[str, str]:
        """torchvision's prefixes and ours."""
        rename = {"conv1": "stem.0.conv", "bn1": "stem.0.bn"}
        convs = {"1": "conv1", "2": "mix", "3": "conv2"} if self.bottleneck else {"1": "conv1", "2": "conv2"}
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, nn.Sequential)
            for j in range(len(stage)):
                old, new = f"layer{i + 1}.{j}", f"stages.{i}.{j}"
                rename |= {f"{old}.downsample.0": f"{new}.shortcut.conv", f"{old}.downsample.1": f"{new}.shortcut.bn"}
                for number, name in convs.items():
                    rename |= {f"{old}.conv{number}": f"{new}.{name}.conv", f"{old}.bn{number}": f"{new}.{name}.bn"}
        return rename
