"""CAS-ViT (arXiv:2408.03703): a mobile backbone whose attention is convolutions and gates."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ArgumentError, Unsupported
from regard.layers import load_strictly
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.base import check_rate
from regard.mechanisms.grid.additive import AdditiveTokenMixer, published_names
from regard.models.vision.backbone import Backbone


class AdditiveBlock(nn.Module):
    """Local convolutions, the mixer and an MLP; all residual."""

    def __init__(self, dim: int, mlp_ratio: float, qkv_bias: bool, drop_rate: float, drop_path: float):
        super().__init__()
        self.local = nn.Sequential(
            nn.Linear(dim, dim), BatchNorm2d(dim), DepthwiseConv2d(dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.norm1, self.norm2 = BatchNorm2d(dim), BatchNorm2d(dim)
        self.attn = AdditiveTokenMixer(dim, qkv_bias, drop_rate)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            *(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(drop_rate)),
            *(nn.Linear(hidden, dim), nn.Dropout(drop_rate)),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CASViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A convolutional stem (stride 4), stages of `AdditiveBlock` with convolutions of stride 2 between them, and the mean
    over the image. With ``distillation`` there are two heads: training gives the logits of both as a pair, evaluation
    their mean.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths: of each stage.
        mlp_ratio: width of the MLPs.
        qkv_bias: of the mixers' first projection.
        distillation: a second head.
        drop_rate: dropout in the MLPs and after the mixers.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, each after a batch norm of its own, see `Backbone`; the model
            then has neither the last norm nor heads.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "cas-vit-xs": {"dims": (48, 56, 112, 220), "depths": (2, 2, 4, 2)},
        "cas-vit-s": {"dims": (48, 64, 128, 256), "depths": (3, 3, 6, 3)},
        "cas-vit-m": {"dims": (64, 96, 192, 384), "depths": (3, 3, 6, 3)},
        "cas-vit-t": {"dims": (96, 128, 256, 512), "depths": (3, 3, 6, 3)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        distillation: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)
        if len(depths) != stages:
            raise ArgumentError(f"depths: expected one for each of {stages} stages, got {len(depths)}")
        check_rate("drop_rate", drop_rate)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        half = dims[0] // 2
        self.stem = nn.Sequential(
            *(Conv2d(in_chans, half, 3, 2), BatchNorm2d(half), nn.ReLU()),
            *(Conv2d(half, dims[0], 3, 2), BatchNorm2d(dims[0]), nn.ReLU()),
        )
        self.downsamples = nn.ModuleList(
            nn.Sequential(Conv2d(before, after, 3, 2), BatchNorm2d(after)) for before, after in pairwise(dims)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(AdditiveBlock(dims[i], mlp_ratio, qkv_bias, drop_rate, rate) for rate in rates[i]))
            for i in range(stages)
        )
        self.feature_norms = nn.ModuleList(BatchNorm2d(dim) for dim in dims) if features_only else None
        self.norm = nn.Identity() if features_only else BatchNorm2d(dims[-1])
        headless = features_only or not num_classes
        self.head = nn.Identity() if headless else _head(dims[-1], num_classes)
        self.head_dist = _head(dims[-1], num_classes) if distillation and not headless else None

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images.movedim(1, -1))
        features = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.downsamples[i - 1](x))
            features.append(x if self.feature_norms is None else self.feature_norms[i](x))
        return features

    def forward_head(self, x: Tensor) -> Any:
        pooled = self.norm(x).mean((1, 2))
        if self.head_dist is None:
            return self.head(pooled)
        both = self.head(pooled), self.head_dist(pooled)
        return both if self.training else (both[0] + both[1]) / 2

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        layers: Sequence[int],
        embed_dims: Sequence[int],
        mlp_ratios: float = 4,
        downsamples: Sequence[bool] = (True,) * 4,
        attn_bias: bool = False,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fork_feat: bool = False,
        distillation: bool = True,
        **_: Any,
    ) -> "CASViT":
        """Weights and arguments of the published ``RCViT``.

        Raises:
            Unsupported: stages without a downsampling between them.
        """
        for i, (before, after) in enumerate(pairwise(embed_dims)):
            if before == after and not downsamples[i]:
                raise Unsupported(f"downsamples: expected True after all stages but the last, got {downsamples!r}")
        model = cls(
            num_classes,
            dims=embed_dims,
            depths=layers,
            mlp_ratio=mlp_ratios,
            qkv_bias=attn_bias,
            distillation=distillation,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            features_only=fork_feat,
        )
        rename = {"patch_embed": "stem", "dist_head": "head_dist"}
        for i, depth in enumerate(layers):  # stages and what stands between them were published as one list
            rename |= {f"norm{2 * i}": f"feature_norms.{i}"}
            rename |= {f"network.{2 * i + 1}.{name}": f"downsamples.{i}.{n}" for n, name in enumerate(("proj", "norm"))}
            for j in range(depth):
                old, new = f"network.{2 * i}.{j}.", f"stages.{i}.{j}."
                rename |= {old: new, f"{old}local_perception.network": f"{new}local"}
                rename |= {f"{old}mlp.fc1": f"{new}mlp.0", f"{old}mlp.fc2": f"{new}mlp.3"}
                rename |= published_names(f"{old}attn.", f"{new}attn.")
        load_strictly(model, state_dict, rename)
        return model


def _head(dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
