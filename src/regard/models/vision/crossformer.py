"""CrossFormer and CrossFormer++ (arXiv:2108.00154, 2303.06908): patches of several sizes, groups near and far."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.lsda import MODES, LSDAttention
from regard.models.vision.backbone import Backbone


class CrossScaleEmbedding(nn.Module):
    """Convolutions of several sizes side by side; (B, H, W, dim_in) to (B, H / stride, W / stride, dim).

    The smallest kernel gives half of the channels, the next a quarter, and so on; the last as many as the one before.
    """

    def __init__(self, dim_in: int, dim: int, kernels: Sequence[int], stride: int):
        super().__init__()
        last = len(kernels) - 1
        if dim % 2**last:
            raise ArgumentError(f"embed_dim: expected a multiple of {2**last} for {last + 1} kernels, got {dim}")
        self.projs = nn.ModuleList(
            Conv2d(dim_in, dim // 2 ** (min(i + 1, last) if last else 0), size, stride, padding=(size - stride) // 2)
            for i, size in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([proj(x) for proj in self.projs], -1)


class CrossFormerBlock(nn.Module, PyTorchModelHubMixin):
    """``x += LSDA(LN x); x += MLP(LN x)`` on (B, H, W, C), and with ``cooling`` then ``x = LN(dwconv(x))``.

    Args:
        dim: C.
        num_heads: heads.
        group_size, interval, mode, qkv_bias, pad_type, mask_padding: see `LSDAttention`.
        mlp_ratio: width of the MLP.
        cooling: CrossFormer++'s layer without residual, which keeps activations from growing with depth.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int = 7,
        interval: int | None = 8,
        mode: str = "short",
        qkv_bias: bool = True,
        pad_type: int = 0,
        mask_padding: bool = True,
        mlp_ratio: float = 4.0,
        cooling: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = LSDAttention(dim, num_heads, group_size, interval, mode, qkv_bias, pad_type, mask_padding)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.cooling = nn.Sequential(DepthwiseConv2d(dim), nn.LayerNorm(dim)) if cooling else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return self.cooling(x + self.drop_path(self.mlp(self.norm2(x))))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        num_heads: int,
        input_resolution: Sequence[int] | None = None,
        group_size: int = 7,
        interval: int = 8,
        lsda_flag: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pad_type: int = 0,
        use_extra_conv: bool = True,
        no_mask: bool = False,
        adaptive_interval: bool = False,
        **others: Any,
    ) -> "CrossFormerBlock":
        """The published ``CrossFormerBlock``; here the grid's size is seen from x."""
        _refuse(others)
        block = cls(
            dim,
            num_heads,
            group_size,
            None if adaptive_interval else interval,
            MODES[lsda_flag],
            qkv_bias,
            pad_type,
            not no_mask,
            mlp_ratio,
            use_extra_conv,
        )
        load_strictly(block, state_dict, {"ex_conv": "cooling.0", "ex_ln": "cooling.1"})
        return block


class CrossFormer(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes); H and W are multiples of the last stage's stride.

    Patches of several sizes around the same centres (stride 4), four stages in which short and long distance attention
    take turns, and convolutions of several sizes with stride 2 between them.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dim: of the first stage; doubles from stage to stage.
        depths, num_heads: of each stage.
        group_size: G of each stage, one number or one per block.
        interval: I of each stage; None samples the whole image.
        mlp_ratio: width of the MLPs, one number or one per stage.
        patch_size: kernels of the first convolutions; the smallest comes first and is the stride.
        merge_size: kernels of the convolutions between stages.
        qkv_bias: whether queries, keys and values have biases.
        pad_type, mask_padding: see `LSDAttention`.
        cooling: whether every third block ends with CrossFormer++'s cooling layer.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "crossformer-tiny": {"embed_dim": 64, "depths": (1, 1, 8, 6), "num_heads": (2, 4, 8, 16)},
        "crossformer-small": {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2},
        "crossformer-base": {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
        "crossformer-large": {
            "embed_dim": 128,
            "depths": (2, 2, 18, 2),
            "num_heads": (4, 8, 16, 32),
            "drop_path_rate": 0.5,
        },
    }
    sizes |= {
        f"crossformer-pp-{name}": {
            "embed_dim": dim,
            "depths": depths,
            "num_heads": heads,
            "group_size": (4, 4, 14, 7),
            "interval": (4, 2, 1, 1),
            "cooling": True,
            "drop_path_rate": rate,
        }
        for name, dim, depths, heads, rate in (
            ("small", 64, (2, 2, 18, 2), (2, 4, 8, 16), 0.2),
            ("base", 96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
            ("large", 128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
            ("huge", 128, (6, 6, 18, 2), (4, 8, 16, 32), 0.5),
        )
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
        interval: Sequence[int | None] = (8, 4, 2, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        patch_size: Sequence[int] = (4, 8, 16, 32),
        merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        qkv_bias: bool = True,
        pad_type: int = 0,
        mask_padding: bool = True,
        cooling: bool = False,
        drop_path_rate: float = 0.1,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(depths)
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, int | float) else list(mlp_ratio)
        groups = [[g] * depth if isinstance(g, int) else list(g) for g, depth in zip(group_size, depths, strict=False)]
        for name, given, expected in (
            ("num_heads", num_heads, stages),
            ("group_size", group_size, stages),
            ("interval", interval, stages),
            ("mlp_ratio", ratios, stages),
            ("merge_size", merge_size, stages - 1),
        ):
            if len(given) != expected:
                raise ArgumentError(f"{name}: expected {expected} for {stages} stages, got {len(given)}")
        if [len(g) for g in groups] != list(depths):
            raise ArgumentError(f"group_size: expected one number or one per block of a stage, got {group_size}")
        dims = [embed_dim * 2**i for i in range(stages)]
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(patch_size[0] * 2**i for i in range(stages))
        self.features_only = features_only
        embedding = CrossScaleEmbedding(in_chans, embed_dim, patch_size, patch_size[0])
        self.stem = nn.Sequential(embedding, nn.LayerNorm(embed_dim))
        self.downsamples = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(before), CrossScaleEmbedding(before, after, kernels, 2))
            for (before, after), kernels in zip(pairwise(dims), merge_size, strict=True)
        )
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, j: int) -> CrossFormerBlock:
            where = (groups[i][j], interval[i], MODES[j % 2])
            cools = cooling and (j + 1) % 3 == 0 and j < depths[i] - 1
            padding = (qkv_bias, pad_type, mask_padding)
            return CrossFormerBlock(dims[i], num_heads[i], *where, *padding, ratios[i], cools, rates[i][j])

        self.stages = nn.ModuleList(
            nn.Sequential(*(block(i, j) for j in range(depth))) for i, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def prepare(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.strides[-1] or x.shape[2] % self.strides[-1]:
            raise ShapeError(
                f"images: expected sides that are multiples of {self.strides[-1]}, got {x.shape[1]} x {x.shape[2]}"
            )
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: Sequence[int] = (4,),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: Sequence[int] = (7, 7, 7, 7),
        crs_interval: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        merge_size: Sequence[Sequence[int]] = ((2,), (2,), (2,)),
        group_type: str = "constant",
        pad_type: int = 0,
        no_mask: bool = False,
        adaptive_interval: bool = False,
        use_acl: bool = False,
        **others: Any,
    ) -> "CrossFormer":
        """Weights and arguments of the published ``CrossFormer``; ``img_size`` is seen from the images."""
        _refuse(others)
        groups: list[int | list[int]] = list(group_size[: len(depths)])
        if group_type == "7_14":  # half of the third stage's size in its first four blocks
            groups[2:3] = [[group_size[2] // (2 if j < 4 else 1) for j in range(depths[2])]]
        elif group_type != "constant":
            raise Unsupported(f"group_type: expected 'constant' or '7_14', got {group_type!r}")
        model = cls(
            num_classes,
            in_chans,
            embed_dim,
            depths,
            num_heads[: len(depths)],
            groups,
            [None] * len(depths) if adaptive_interval else crs_interval[: len(depths)],
            mlp_ratio if isinstance(mlp_ratio, int | float) else mlp_ratio[: len(depths)],
            patch_size,
            merge_size[: len(depths) - 1],
            qkv_bias,
            pad_type,
            not no_mask,
            use_acl,
            drop_path_rate,
        )
        rename = {"patch_embed.projs": "stem.0.projs", "patch_embed.norm": "stem.1"}
        for i, depth in enumerate(depths):
            rename |= {f"layers.{i}.downsample.norm": f"downsamples.{i}.0"}
            rename |= {f"layers.{i}.downsample.reductions": f"downsamples.{i}.1.projs"}
            for old, new in ((f"layers.{i}.blocks.{j}", f"stages.{i}.{j}") for j in range(depth)):
                rename |= {old: new, f"{old}.ex_conv": f"{new}.cooling.0", f"{old}.ex_ln": f"{new}.cooling.1"}
        load_strictly(model, state_dict, rename)
        return model


#: published arguments that change nothing here, or only in the value they have in all published models
_KNOWN = {"qk_scale": None, "use_cpe": False, "ape": False, "patch_norm": True}
_IDLE = {"drop_rate", "attn_drop_rate", "drop", "attn_drop", "drop_path", "use_checkpoint", "num_patch_size"}


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in _KNOWN and name not in _IDLE:
            raise ArgumentError(f"{name}: not an argument of the published code")
        if name in _KNOWN and value != _KNOWN[name]:
            raise Unsupported(f"{name}: only {_KNOWN[name]}, as in the published models, got {value!r}")
