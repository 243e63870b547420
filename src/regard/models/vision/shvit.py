"""SHViT (arXiv:2401.16456): large patches, few channels in one head of attention."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, Unsupported
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN, fold_bn
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.layers.squeeze_excite import SqueezeExcite
from regard.mechanisms.grid.single_head import SingleHeadAttention
from regard.models.vision.backbone import Backbone, check_stages


class Residual(nn.Module):
    """``x + branch(x)``."""

    def __init__(self, branch: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.branch, self.drop_path = branch, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


class ShvitBlock(nn.Module):
    """A depthwise convolution, attention if ``partial_dim`` is given, and a feed-forward network; all residual."""

    def __init__(
        self,
        dim: int,
        partial_dim: int | None = None,
        qk_dim: int = 16,
        drop_path: float = 0.0,
        conv_init: float = 0.0,
    ):
        super().__init__()
        self.conv = Residual(ConvBN(dim, dim, 3, groups=dim, weight_init=conv_init), drop_path)
        self.mixer = (
            nn.Identity() if partial_dim is None else Residual(SingleHeadAttention(dim, partial_dim, qk_dim), drop_path)
        )
        ffn = nn.Sequential(ConvBN(dim, 2 * dim), nn.ReLU(), ConvBN(2 * dim, dim, weight_init=0.0))
        self.ffn = Residual(ffn, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class PatchMerging(nn.Sequential):
    """Half the height and width, rounded up: an inverted bottleneck with squeeze and excite."""

    def __init__(self, dim_in: int, dim_out: int):
        hidden = 4 * dim_in
        squeezed = max(8, int(dim_in + 4) // 8 * 8)  # a quarter, to the nearest multiple of 8
        super().__init__(
            *(ConvBN(dim_in, hidden), nn.ReLU()),
            *(ConvBN(hidden, hidden, 3, 2, groups=hidden), nn.ReLU(), SqueezeExcite(hidden, squeezed)),
            ConvBN(hidden, dim_out),
        )


class NormLinear(nn.Module):
    """A batch norm and a linear layer: the classifier."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim_in)
        self.linear = nn.Linear(dim_in, dim_out)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(x))

    def fused(self) -> nn.Linear:
        """The linear layer, equal to both in evaluation; it is changed."""
        scale, shift = fold_bn(torch.ones_like(self.bn.weight), self.bn)
        self.linear.bias.add_(self.linear.weight @ shift)
        self.linear.weight.mul_(scale)
        return self.linear


class SHViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    Four convolutions of stride 2 at once, then stages of `ShvitBlock` with `PatchMerging` between them, and the mean
    over the image. With ``distillation`` there are two heads: training gives the logits of both as a pair, evaluation
    their mean.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths: of each stage.
        partial_dims: of each stage, the channels that attention mixes.
        qk_dim: of queries and keys, one for all or one per stage.
        attention: which stages have any.
        distillation: a second head.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "shvit-s1": {"dims": (128, 224, 320), "depths": (2, 4, 5), "partial_dims": (32, 48, 68)},
        "shvit-s2": {"dims": (128, 308, 448), "depths": (2, 4, 5), "partial_dims": (32, 66, 96)},
        "shvit-s3": {"dims": (192, 352, 448), "depths": (3, 5, 5), "partial_dims": (48, 75, 96)},
        "shvit-s4": {"dims": (224, 336, 448), "depths": (4, 7, 6), "partial_dims": (48, 72, 96)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        partial_dims: Sequence[int] = (32, 48, 68),
        qk_dim: int | Sequence[int] = 16,
        attention: Sequence[bool] = (False, True, True),
        distillation: bool = False,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)
        qk_dims = [qk_dim] * stages if isinstance(qk_dim, int) else list(qk_dim)
        check_stages(stages, depths=depths, partial_dims=partial_dims, qk_dim=qk_dims, attention=attention)
        if dims[0] < 8:
            raise ArgumentError(f"dims: expected at least 8 in the first stage, whose stem is narrower, got {dims[0]}")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(16 * 2**i for i in range(stages))
        self.features_only = features_only
        stem: list[nn.Module] = []
        for before, after in pairwise((in_chans, *(dims[0] // part for part in (8, 4, 2, 1)))):
            stem += [ConvBN(before, after, 3, 2), nn.ReLU()]
        self.stem = nn.Sequential(*stem[:-1])
        self.downsamples = nn.ModuleList(
            nn.Sequential(
                ShvitBlock(before, conv_init=1.0), PatchMerging(before, after), ShvitBlock(after, conv_init=1.0)
            )
            for before, after in pairwise(dims)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(ShvitBlock(dims[i], partial_dims[i] if attention[i] else None, qk_dims[i], rate) for rate in rates[i])
            )
            for i in range(stages)
        )
        self.head = NormLinear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.head_dist = NormLinear(dims[-1], num_classes) if num_classes and distillation else None

    def forward_head(self, x: Tensor) -> Any:
        pooled = x.mean((1, 2))
        if self.head_dist is None:
            return self.head(pooled)
        both = self.head(pooled), self.head_dist(pooled)
        return both if self.training else (both[0] + both[1]) / 2

    @torch.no_grad()
    def fuse(self) -> Self:
        """Fold every batch norm into its neighbour and every residual depthwise convolution's identity into it.

        In place, for inference: the logits stay the same, and the norms' statistics are gone.
        """
        for block in [m for m in self.modules() if isinstance(m, ShvitBlock)]:
            if isinstance(block.conv, Residual):
                conv = block.conv.branch
                assert isinstance(conv, ConvBN)
                fused = conv.fused()
                assert isinstance(fused, Conv2d)
                fused.weight[:, :, 1, 1] += 1
                block.conv = fused  # type: ignore[assignment]
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, ConvBN):
                    setattr(module, name, child.fused())
        for name in ("head", "head_dist"):
            if isinstance(head := getattr(self, name), NormLinear):
                setattr(self, name, head.fused())
        return self

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (128, 256, 384),
        partial_dim: Sequence[int] = (32, 64, 96),
        qk_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = (1, 2, 3),
        types: Sequence[str] = ("s", "s", "s"),
        down_ops: Sequence[Sequence[Any]] = (("subsample", 2), ("subsample", 2), ("",)),
        distillation: bool = False,
    ) -> "SHViT":
        """Weights and arguments of the published ``SHViT``; block types are "s" (with attention) and "i" (without).

        Raises:
            Unsupported: stages without a downsampling between them.
        """
        if any(op[0] != "subsample" for op in down_ops[: len(embed_dim) - 1]):
            raise Unsupported(f"down_ops: expected 'subsample' after all stages but the last, got {down_ops!r}")
        if not set(types) <= {"s", "i"}:
            raise ArgumentError(f"types: expected 's' or 'i' for each stage, got {types!r}")
        with_attention = [kind == "s" for kind in types]
        model = cls(
            num_classes, in_chans, embed_dim, depth, partial_dim, qk_dim, with_attention, distillation=distillation
        )
        rename = {"patch_embed": "stem"}
        for i, stage_depth in enumerate(depth):
            first = 3 if i else 0  # the downsampling before a stage was published as its first three blocks
            rename |= {f"blocks{i + 1}.{first + j}": f"stages.{i}.{j}" for j in range(stage_depth)}
            if i:
                old, new = f"blocks{i + 1}", f"downsamples.{i - 1}"
                for j in (0, 2):
                    rename |= {f"{old}.{j}.0": f"{new}.{j}.conv", f"{old}.{j}.1": f"{new}.{j}.ffn"}
                parts = {"conv1": 0, "conv2": 2, "se": 4, "conv3": 5}
                rename |= {f"{old}.1.{part}": f"{new}.1.{n}" for part, n in parts.items()}
        for head in ("head", "head_dist"):
            rename |= {f"{head}.l": f"{head}.linear"}
        own = {"m": "branch", "c": "conv", "pw1": "0", "pw2": "2", "proj.1": "proj"}
        state = {}
        for name, tensor in state_dict.items():
            prefix = max((old for old in rename if name.startswith(f"{old}.")), key=len, default=None)
            if prefix is not None:
                name = rename[prefix] + name[len(prefix) :]
            state[re.sub(r"(?<=\.)(m|c|pw1|pw2|proj\.1)(?=\.)", lambda part: own[part[0]], name)] = tensor
        load_strictly(model, state)
        return model
