"""DaViT (arXiv:2204.03645): attention inside windows and attention between channels by turns."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.channel import ChannelAttention
from regard.mechanisms.grid.window import WindowAttention2d
from regard.models.vision.backbone import Backbone, check_stages

KINDS = ("spatial", "channel")


class DaViTBlock(nn.Module, PyTorchModelHubMixin):
    """``x += cpe(x); x += attention(LN x); x += cpe(x); x += MLP(LN x)`` on (B, H, W, C).

    Args:
        dim: C.
        kind: of attention, "spatial" (`WindowAttention2d`) or "channel" (`ChannelAttention`).
        num_heads: heads, or groups of channels.
        window_size: side of the windows, for "spatial".
        mlp_ratio: width of the MLP; 0 for none.
        qkv_bias: whether queries, keys and values have biases.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        kind: str,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ArgumentError(f"kind: expected 'spatial' or 'channel', got {kind!r}")
        self.cpe = nn.ModuleList(DepthwiseConv2d(dim) for _ in range(2))
        self.norm1 = nn.LayerNorm(dim)
        self.attn: nn.Module = (
            ChannelAttention(dim, num_heads, qkv_bias)
            if kind == "channel"
            else WindowAttention2d(dim, num_heads, window_size, qkv_bias)
        )
        self.kind, self.has_mlp = kind, mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe[0](x)
        normed = self.norm1(x)
        mixed = self.attn(normed) if self.kind == "spatial" else self.attn(normed.flatten(1, 2)).view_as(x)
        x = x + self.drop_path(mixed)
        x = x + self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x))) if self.has_mlp else x

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        kind: str,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool | None = None,
        ffn: bool = True,
    ) -> "DaViTBlock":
        """The published ``SpatialBlock`` or ``ChannelBlock``, whose defaults for ``qkv_bias`` differ."""
        bias = kind == "spatial" if qkv_bias is None else qkv_bias
        block = cls(dim, kind, num_heads, window_size, mlp_ratio if ffn else 0.0, bias)
        load_strictly(block, state_dict, {f"cpe.{n}.proj": f"cpe.{n}" for n in range(2)})
        return block


class Stem(nn.Module):
    """Convolution 7×7 with stride 4, then LN; zeros fill the image up to a multiple of 4."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = Conv2d(in_chans, dim, 7, 4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(_filled(x, 4)))


class Downsample(nn.Module):
    """LN, then a convolution 2×2 with stride 2, or 3×3 if overlapped; zeros fill the normalised image up to even sides.

    (B, H, W, dim) to (B, ⌈H/2⌉, ⌈W/2⌉, dim_out).
    """

    def __init__(self, dim: int, dim_out: int, overlapped: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        kernel_size, padding = (3, 1) if overlapped else (2, 0)
        self.proj = Conv2d(dim, dim_out, kernel_size, 2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_filled(self.norm(x), 2))


class DaViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes), at any size.

    A convolution of stride 4 and four stages with convolutions of stride 2 between them. In a stage blocks with window
    attention and blocks with channel attention take turns: the ones mix neighbours, the others the whole image.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dims: of each stage.
        depths: repetitions of ``kinds`` in each stage.
        num_heads: heads, and groups of channels, of each stage.
        window_size: side of the windows.
        mlp_ratio: width of the MLPs; 0 for none.
        qkv_bias: whether queries, keys and values have biases.
        overlapped_patch: whether the convolutions between stages overlap.
        drop_path_rate: of the last block; rises linearly from 0.
        kinds: of attention, in their order.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "davit-tiny": {"embed_dims": (96, 192, 384, 768), "depths": (1, 1, 3, 1), "num_heads": (3, 6, 12, 24)},
        "davit-small": {"embed_dims": (96, 192, 384, 768), "depths": (1, 1, 9, 1), "num_heads": (3, 6, 12, 24)},
        "davit-base": {"embed_dims": (128, 256, 512, 1024), "depths": (1, 1, 9, 1), "num_heads": (4, 8, 16, 32)},
        "davit-large": {
            "embed_dims": (192, 384, 768, 1536),
            "depths": (1, 1, 9, 1),
            "num_heads": (6, 12, 24, 48),
            "window_size": 12,
        },
        "davit-huge": {"embed_dims": (256, 512, 1024, 2048), "depths": (1, 1, 9, 1), "num_heads": (8, 16, 32, 64)},
        "davit-giant": {"embed_dims": (384, 768, 1536, 3072), "depths": (1, 1, 12, 3), "num_heads": (12, 24, 48, 96)},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        overlapped_patch: bool = False,
        drop_path_rate: float = 0.1,
        kinds: Sequence[str] = KINDS,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(embed_dims)
        check_stages(stages, depths=depths, num_heads=num_heads)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dims[-1]
        self.channels, self.strides = tuple(embed_dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        self.stem = Stem(in_chans, embed_dims[0])
        self.downsamples = nn.ModuleList(Downsample(*dims, overlapped_patch) for dims in pairwise(embed_dims))
        rates = drop_path_rates(drop_path_rate, [depth * len(kinds) for depth in depths])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    DaViTBlock(dim, kinds[j % len(kinds)], num_heads[i], window_size, mlp_ratio, qkv_bias, rate)
                    for j, rate in enumerate(rates[i])
                )
            )
            for i, dim in enumerate(embed_dims)
        )
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((1, 2))))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (1, 1, 3, 1),
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 192, 256),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        attention_types: Sequence[str] = KINDS,
        ffn: bool = True,
        overlapped_patch: bool = False,
        img_size: int = 224,
    ) -> "DaViT":
        """Weights and arguments of the published ``DaViT``; ``img_size`` has no effect there either."""
        if patch_size != 4:
            raise Unsupported(f"patch_size: only 4, as in the published models, got {patch_size}")
        model = cls(
            num_classes,
            in_chans,
            embed_dims,
            depths,
            num_heads,
            window_size,
            mlp_ratio if ffn else 0.0,
            qkv_bias,
            overlapped_patch,
            drop_path_rate,
            attention_types,
        )
        rename = {"patch_embeds.0": "stem", "norms": "norm"}
        for i, depth in enumerate(depths):
            rename |= {f"patch_embeds.{i}": f"downsamples.{i - 1}"} if i else {}
            for j in range(depth * len(attention_types)):
                old = f"main_blocks.{i}.{j // len(attention_types)}.{j % len(attention_types)}"
                rename |= {old: f"stages.{i}.{j}"}
                rename |= {f"{old}.cpe.{n}.proj": f"stages.{i}.{j}.cpe.{n}" for n in range(2)}
        load_strictly(model, state_dict, rename)
        return model


def _filled(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and right of (B, H, W, C) up to a multiple of both sides."""
    down, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x
