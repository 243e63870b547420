"""What every vision backbone promises, as users of timm expect it."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError


class Backbone(nn.Module, PyTorchModelHubMixin):
    """Images (B, in_chans, H, W) to logits (B, num_classes), or to the feature maps of its stages.

    A subclass has its published configurations in ``sizes``, takes ``num_classes`` (0: pooled features), ``in_chans``,
    ``drop_path_rate`` and ``features_only`` among its arguments, sets the attributes below, and overrides
    `forward_head`; also `prepare` if it cannot take every size, and `forward_features` if its stages are not a row of
    modules. Inside, images are channels-last.

    Attributes:
        sizes: arguments of the published models by name, such as "mala-tiny".
        example_size: a side of images that they take.
        num_features: channels of the pooled features.
        channels, strides: of each stage's feature map; a stride of 4 means a quarter of the height and width.
        stem, stages: the modules in the order of `forward_features`.
        downsamples: one before every stage but the first, where the stages do not shrink the image themselves.
        features_only: `forward` gives the list of feature maps (B, C, H / stride, W / stride) instead of logits.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {}
    example_size: ClassVar[int] = 224
    in_chans: int
    num_classes: int
    num_features: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    stem: nn.Module
    stages: nn.ModuleList
    downsamples: nn.ModuleList
    features_only: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList()

    def prepare(self, x: Tensor) -> Tensor:
        """Images (B, H, W, in_chans) as the stem takes them: filled up, or refused with a ShapeError."""
        return x

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The output of each stage, (B, H / stride, W / stride, C)."""
        x = self.stem(self.prepare(images.movedim(1, -1)))
        features = []
        for i, stage in enumerate(self.stages):
            if i and len(self.downsamples):
                x = self.downsamples[i - 1](x)
            x = stage(x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's output to logits, or to pooled features (B, num_features) with num_classes=0."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Any:
        """Logits (B, num_classes), or with ``features_only`` the list of feature maps, channels first.

        Raises:
            ShapeError: not (B, in_chans, H, W), or a size this backbone cannot take.
        """
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ShapeError(f"images: expected (B, {self.in_chans}, H, W), got {tuple(images.shape)}")
        features = self.forward_features(images)
        return [x.movedim(-1, 1) for x in features] if self.features_only else self.forward_head(features[-1])


def check_stages(stages: int, **given: Sequence[Any]) -> None:
    """Refuse arguments that have no value for each stage.

    Raises:
        ArgumentError: names the argument.
    """
    for name, values in given.items():
        if len(values) != stages:
            raise ArgumentError(f"{name}: expected one for each of {stages} stages, got {len(values)}")
