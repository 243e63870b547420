"""SpectFormer-H (arXiv:2304.06446): four stages, whose first two gate frequencies and whose last two attend."""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.layers import MLP, load_strictly, split_rows
from regard.layers.grid import BatchNorm2d, Conv2d, DepthwiseConv2d, DropPath, drop_path_rates
from regard.mechanisms.grid.spectral import SpectralGating
from regard.mechanisms.softmax import SoftmaxAttention
from regard.models.vision.backbone import Backbone
from regard.models.vision.spectformer import check_image, image_shape, small_linear_weights


class TokenLabels(NamedTuple):
    """What training with token labels gives.

    Attributes:
        logits: (B, num_classes) of the images.
        tokens: (B, h·w, num_classes) of every place in the last stage, put back where images were mixed.
        box: (4,) top, left, bottom and right of the part of the last stage that is of the batch's mirror image: the
            first image holds a piece of the last one, and so on.
    """

    logits: Tensor
    tokens: Tensor
    box: Tensor


class ConvMLP(nn.Module):
    """``W2 GELU(dwconv(W1 x))``; (B, H, W, C) to the same."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv2d(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class HierarchicalBlock(nn.Module):
    """``x + mixer(norm(x))``, then ``x + MLP(norm(x))``, on grids."""

    def __init__(self, mixer: SpectralGating | SoftmaxAttention, mlp_ratio: float, drop_path: float, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(mixer.dim, eps), nn.LayerNorm(mixer.dim, eps)
        self.mixer = mixer
        self.mlp = ConvMLP(mixer.dim, int(mixer.dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = self.mixer(y) if isinstance(self.mixer, SpectralGating) else self.mixer(y.flatten(1, 2)).view_as(x)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """The mean token attends to itself and all others, and goes through an MLP; (B, N, C) to (B, 1, C)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = SoftmaxAttention(dim, num_heads, bias=True, causal=False)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(1, keepdim=True)
        seen = self.norm1(torch.cat([token, x], 1))
        token = token + self.attn(seen[:, :1], seen)
        return token + self.mlp(self.norm2(token))


class SpectFormerH(Backbone):
    """Images (B, in_chans, *img_size) to logits (B, num_classes).

    A convolutional stem (stride 4), stages of blocks with convolutions of stride 2 between them, and a token that
    starts as the image's mean and attends to it once. Filters are made for one size of image, `resize` makes them for
    another.

    With ``token_label`` every place of the last stage is classified too. Evaluation adds half of its largest logit per
    class. Training pastes a random box of the mirrored batch into the first stage, and gives `TokenLabels`.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        img_size: height and width, or one number for both.
        dims, depths, num_heads, mlp_ratios: of each stage; heads matter where there is attention.
        stem_dim: channels of the stem's first convolutions.
        spectral_stages: how many stages gate frequencies, the first ones.
        token_label: classify places, see above.
        norm_eps: of the layer norms.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "spectformer-h-s": {
            "dims": (64, 128, 320, 448),
            "depths": (3, 4, 6, 3),
            "num_heads": (2, 4, 10, 14),
            "token_label": True,
        },
        "spectformer-h-b": {
            "dims": (64, 128, 320, 512),
            "depths": (3, 4, 12, 3),
            "num_heads": (2, 4, 10, 16),
            "stem_dim": 64,
            "token_label": True,
        },
        "spectformer-h-l": {
            "dims": (96, 192, 384, 512),
            "depths": (3, 6, 18, 3),
            "num_heads": (3, 6, 12, 16),
            "stem_dim": 64,
            "token_label": True,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        stem_dim: int = 32,
        spectral_stages: int = 2,
        token_label: bool = False,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)
        for name, given in (("depths", depths), ("num_heads", num_heads), ("mlp_ratios", mlp_ratios)):
            if len(given) < stages:
                raise ArgumentError(f"{name}: expected one for each of {stages} stages, got {len(given)}")
        if not 0 <= spectral_stages <= stages:
            raise ArgumentError(f"spectral_stages: expected 0 to {stages}, got {spectral_stages}")
        self.img_size = image_shape(img_size)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(stages))
        self.features_only = features_only
        stem: list[nn.Module] = []
        for before, kernel, stride in ((in_chans, 7, 2), (stem_dim, 3, 1), (stem_dim, 3, 1)):
            stem += [Conv2d(before, stem_dim, kernel, stride, bias=False), BatchNorm2d(stem_dim), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.downsamples = nn.ModuleList(
            nn.Sequential(Conv2d(before, after, 3, 2), nn.LayerNorm(after))
            for before, after in pairwise((stem_dim, *dims))
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                mixer: SpectralGating | SoftmaxAttention
                if i < spectral_stages:
                    mixer = SpectralGating(dim, self._grid(i))
                else:
                    mixer = SoftmaxAttention(dim, num_heads[i], bias=True, causal=False)
                blocks.append(HierarchicalBlock(mixer, mlp_ratios[i], rate, norm_eps))
            self.stages.append(nn.Sequential(*blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, norm_eps) for dim in dims)
        self.class_block = ClassBlock(dims[-1], num_heads[-1], mlp_ratios[-1], norm_eps)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(dims[-1], num_classes) if num_classes and token_label else None
        small_linear_weights(self)
        for module in self.modules():
            if isinstance(module, Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Any:
        if self.aux_head is None or self.features_only or not self.training:
            return super().forward(images)
        height, width = self._grid(len(self.channels) - 1)
        box = random_box(height, width, images.device)
        x = self.forward_features(images, box)[-1]
        token, tokens = self._classified(x)
        return TokenLabels(self.head(token), paste(self.aux_head(tokens), box).flatten(1, 2), box)

    def forward_features(self, images: Tensor, box: Tensor | None = None) -> list[Tensor]:
        """The stages' outputs; with ``box`` (4,), in places of the last stage, that part is of the mirrored batch."""
        check_image(images, self.img_size)
        x = self.stem(images.movedim(1, -1))
        features = []
        for i, stage in enumerate(self.stages):
            x = self.downsamples[i](x)
            if i == 0 and box is not None:
                x = paste(x, box * 2 ** (len(self.stages) - 1))
            x = stage(x)
            features.append(x)
            if i < len(self.stages) - 1:
                x = features[-1] = self.norms[i](x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        token, tokens = self._classified(x)
        if self.aux_head is None:
            return self.head(token)
        return self.head(token) + 0.5 * self.aux_head(tokens).amax((1, 2))

    def _classified(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, C) and all tokens (B, h, w, C), normalised."""
        norm = self.norms[-1]
        return norm(self.class_block(x.flatten(1, 2))[:, 0]), norm(x)

    def _grid(self, stage: int) -> tuple[int, int]:
        height, width = (-(-side // self.strides[stage]) for side in self.img_size)
        return height, width

    def resize(self, img_size: int | Sequence[int]) -> Self:
        """Make it for images of another size, in place: filters are interpolated bilinearly."""
        self.img_size = image_shape(img_size)
        for i, stage in enumerate(self.stages):
            for block in stage.children():
                if isinstance(block, HierarchicalBlock) and isinstance(block.mixer, SpectralGating):
                    block.mixer.resize(self._grid(i))
        if isinstance(self._hub_mixin_config, dict):  # what a saved model is made from
            self._hub_mixin_config["img_size"] = self.img_size
        return self

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_hidden_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 4, 6, 3),
        num_stages: int = 4,
        token_label: bool = True,
        norm_eps: float = 1e-5,
        **_: Any,
    ) -> "SpectFormerH":
        """Weights and arguments of the published hierarchical ``SpectFormer``.

        ``norm_eps`` stands for its ``norm_layer``: 1e-5 by that class's default, 1e-6 in the named models. The size of
        the image is that of the filters, whose published grids have even sides.
        """
        height, frequencies = state_dict["block1.0.attn.complex_weight"].shape[:2]
        model = cls(
            num_classes,
            in_chans,
            (4 * height, 8 * (frequencies - 1)),
            embed_dims[:num_stages],
            depths[:num_stages],
            num_heads[:num_stages],
            mlp_ratios[:num_stages],
            stem_hidden_dim,
            sum(f"block{i + 1}.0.attn.complex_weight" in state_dict for i in range(num_stages)),
            token_label,
            norm_eps,
            drop_path_rate,
        )
        state = dict(state_dict)
        rename = {"patch_embed1.conv": "stem", "post_network.0": "class_block"}
        attention = {"attn.proj": "attn.o_proj", "attn.q": "attn.q_proj"}
        rename |= {f"post_network.0.{old}": f"class_block.{new}" for old, new in attention.items()}
        split_rows(state, "post_network.0.attn.kv", ("post_network.0.attn.k_proj", "post_network.0.attn.v_proj"))
        for i in range(num_stages):
            rename |= {
                f"patch_embed{i + 1}.proj": f"downsamples.{i}.0",
                f"patch_embed{i + 1}.norm": f"downsamples.{i}.1",
            }
            rename |= {f"norm{i + 1}": f"norms.{i}"}
            for j in range(depths[i]):
                old, new = f"block{i + 1}.{j}", f"stages.{i}.{j}"
                split_rows(state, f"{old}.attn.kv", (f"{old}.attn.k_proj", f"{old}.attn.v_proj"))
                rename |= {old: new, f"{old}.attn": f"{new}.mixer", f"{old}.attn.complex_weight": f"{new}.mixer.weight"}
                rename |= {f"{old}.attn.q": f"{new}.mixer.q_proj", f"{old}.attn.proj": f"{new}.mixer.o_proj"}
                rename |= {f"{old}.mlp.dwconv.dwconv": f"{new}.mlp.dwconv"}
        load_strictly(model, state, rename)
        return model


def random_box(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(top, left, bottom, right) around a uniform place, of a uniform share of the area, cut at the borders."""
    side = torch.rand((), device=device).sqrt()
    ends = []
    for length in (height, width):
        half = (length * side).long() // 2
        centre = torch.randint(length, (), device=device)
        ends.append(((centre - half).clamp(min=0), (centre + half).clamp(max=length)))
    (top, bottom), (left, right) = ends
    return torch.stack([top, left, bottom, right])


def paste(x: Tensor, box: Tensor) -> Tensor:
    """x (B, H, W, C) with the box (4,) taken from the batch in reverse; twice is nothing."""
    rows, columns = torch.arange(x.shape[1], device=x.device), torch.arange(x.shape[2], device=x.device)
    top, left, bottom, right = box
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return torch.where(inside.unsqueeze(-1), x.flip(0), x)
