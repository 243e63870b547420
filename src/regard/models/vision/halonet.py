"""HaloNet (arXiv:2103.12731): residual networks whose 3×3 convolutions are halo attention."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ArgumentError, Unsupported
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN
from regard.layers.grid import BatchNorm2d, DropPath, drop_path_rates
from regard.mechanisms.grid.halo import HaloAttention, make_divisible
from regard.models.vision.backbone import Backbone

#: kernel size of a stem's convolutions, and their channels over those of the stem
_STEMS: dict[str, tuple[int, tuple[float, ...]]] = {
    "7x7": (7, (1,)),
    "3x3": (3, (1,)),
    "deep": (3, (1, 1, 1)),
    "tiered": (3, (3 / 8, 1 / 2, 1)),
}
_ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class MaxPool(nn.MaxPool2d):
    """3×3 at stride 2 on (B, H, W, C)."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Bottleneck(nn.Module):
    """``act(shortcut(x) + BN(W2 mix(act(BN(W1 x)))))``; mix is halo attention or a 3×3 convolution, with BN and act.

    (B, H, W, dim_in) to (B, H / stride, W / stride, dim).

    Args:
        dim_in, dim, stride: see above.
        inner: channels between.
        halo: arguments of `HaloAttention`, None for the convolution.
        value_ratio: channels of the attention's values over ``inner``.
        act: name of the activation.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        stride: int,
        inner: int,
        halo: Mapping[str, Any] | None,
        value_ratio: float = 1.0,
        act: str = "relu",
        drop_path: float = 0.0,
    ):
        super().__init__()
        same = dim_in == dim and stride == 1
        self.shortcut = nn.Identity() if same else ConvBN(dim_in, dim, stride=stride)
        self.conv1 = ConvBN(dim_in, inner)
        width = inner if halo is None else int(inner * value_ratio)
        self.mix: nn.Module = ConvBN(inner, inner, 3, stride)
        self.norm: nn.Module = nn.Identity()
        if halo is not None:
            self.mix, self.norm = HaloAttention(inner, width, stride=stride, **halo), BatchNorm2d(width)
        self.conv2 = ConvBN(width, dim)
        self.act = _ACTS[act]()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.act(self.conv1(x)))
        y = self.conv2(self.act(self.norm(y)))
        return self.act(self.shortcut(x) + self.drop_path(y))


class HaloNet(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes). Every stage's map must consist of whole blocks.

    A stem (stride 4), four stages of bottleneck blocks and the mean over the image.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        dims, depths, strides: of each stage.
        halo: for each block of each stage whether it is halo attention, else it is a 3×3 convolution; None for all.
        num_heads, head_dim, block_size, halo_size: of `HaloAttention`, one for all or one per stage.
        bottleneck_ratio: channels inside a block over those of the stage, one for all or one per stage.
        value_ratio: channels of the values over those inside.
        stem_dim: channels of the stem.
        stem: "7x7" or "3x3", one convolution; "deep" or "tiered", three of 3×3, in the latter the first are narrower.
        stem_pool: max pooling after the stem; without, the last of three convolutions has stride 2 instead.
        act: "relu", "silu" or "gelu".
        projection: channels of a 1×1 convolution before the pooling, 0 for none.
        drop_path_rate: of the last block; rises linearly from 0.
        attention: more arguments of `HaloAttention`.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    example_size: ClassVar[int] = 256  # its maps are multiples of its blocks
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "halonet-h1": {},
        "halonet-26t": {
            "dims": (256, 512, 1024, 2048),
            "depths": (2, 2, 2, 2),
            "halo": ((False,) * 2, (False,) * 2, (False, True), (True,) * 2),
            "halo_size": 2,
            "bottleneck_ratio": 0.25,
            "stem": "tiered",
        },
        "halonet-50ts": {
            "dims": (256, 512, 1024, 2048),
            "depths": (3, 4, 6, 3),
            "halo": ((False,) * 3, (False, False, False, True), (False, True) * 3, (False, True, False)),
            "num_heads": (8, 4, 8, 8),
            "bottleneck_ratio": 0.25,
            "stem": "tiered",
            "act": "silu",
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 10, 3),
        strides: Sequence[int] = (1, 2, 2, 2),
        halo: Sequence[Sequence[bool]] | None = None,
        num_heads: int | Sequence[int] = 8,
        head_dim: int | None = None,
        block_size: int | Sequence[int] = 8,
        halo_size: int | Sequence[int] = 3,
        bottleneck_ratio: float | Sequence[float] = 1.0,
        value_ratio: float = 1.0,
        stem_dim: int = 64,
        stem: str = "7x7",
        stem_pool: bool = True,
        act: str = "relu",
        projection: int = 0,
        drop_path_rate: float = 0.0,
        attention: Mapping[str, Any] | None = None,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(dims)

        def per_stage(name: str, given: Any) -> list[Any]:
            values = [given] * stages if isinstance(given, int | float) else list(given)
            if len(values) != stages:
                raise ArgumentError(f"{name}: expected one for each of {stages} stages, got {len(values)}")
            return values

        depths, strides = per_stage("depths", list(depths)), per_stage("strides", list(strides))
        heads, blocks = per_stage("num_heads", num_heads), per_stage("block_size", block_size)
        halos, ratios = per_stage("halo_size", halo_size), per_stage("bottleneck_ratio", bottleneck_ratio)
        kinds = [[True] * depth for depth in depths] if halo is None else [list(each) for each in halo]
        if [len(each) for each in kinds] != depths:
            raise ArgumentError(f"halo: expected one for each block of stages of {depths} blocks, got {halo}")
        if act not in _ACTS:
            raise ArgumentError(f"act: expected one of {', '.join(_ACTS)}, got {act!r}")
        if stem not in _STEMS:
            raise ArgumentError(f"stem: expected one of {', '.join(_STEMS)}, got {stem!r}")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, projection or dims[-1]
        kernel, shares = _STEMS[stem]
        widths = [int(share * stem_dim) for share in shares]
        convs: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([in_chans, *widths], widths, strict=False)):
            down = i == 0 or (i == len(widths) - 1 and not stem_pool)
            convs += [ConvBN(before, after, kernel, 2 if down else 1), _ACTS[act]()]
        stride = 4 if stem_pool or len(widths) > 1 else 2
        self.stem = nn.Sequential(*convs, *([MaxPool()] if stem_pool else []))
        self.channels, self.features_only = tuple(dims), features_only
        reached, dim = [], stem_dim
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i in range(stages):
            settings = {
                "num_heads": heads[i],
                "head_dim": head_dim,
                "block_size": blocks[i],
                "halo_size": halos[i],
                **(attention or {}),
            }
            made = []
            for j, kind in enumerate(kinds[i]):
                inner, step = make_divisible(dims[i] * ratios[i]), strides[i] if j == 0 else 1
                mix = settings if kind else None
                made.append(Bottleneck(dim, dims[i], step, inner, mix, value_ratio, act, rates[i][j]))
                dim = dims[i]
            self.stages.append(nn.Sequential(*made))
            stride *= strides[i]
            reached.append(stride)
        self.strides = tuple(reached)
        self.proj = nn.Sequential(ConvBN(dim, projection), _ACTS[act]()) if projection else nn.Identity()
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.proj(x).mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        cfg: Mapping[str, Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **_: Any,
    ) -> "HaloNet":
        """timm's ``ByobNet`` with the dict of its ``ByoModelCfg``: stages of blocks "self_attn" (halo) and "bottle".

        Raises:
            Unsupported: other blocks, stems or layers, or settings that differ within a stage.
        """
        stages = [[block] if isinstance(block, Mapping) else list(block) for block in cfg["blocks"]]
        stages = [[{**b, "d": 1} for b in stage for _ in range(b["d"])] for stage in stages]
        for name, known in (
            ("self_attn_layer", ("halo",)),
            ("stem_type", tuple(_STEMS)),
            ("stem_pool", ("max", "maxpool", "", None)),
            ("norm_layer", ("batchnorm",)),
            ("downsample", ("conv1x1",)),
            ("attn_layer", (None,)),
            ("head_type", ("classifier",)),
            ("width_factor", (1.0,)),
        ):
            if name in cfg and cfg[name] not in known:
                raise Unsupported(f"cfg: {name} {cfg[name]!r} is no HaloNet's; known are {known}")
        for block in (b for stage in stages for b in stage):
            if block["type"] not in ("self_attn", "bottle") or block.get("gs") or block.get("block_kwargs"):
                raise Unsupported(f"cfg: only plain blocks 'self_attn' and 'bottle', got {block}")

        def common(name: str, default: Any = None) -> list[Any]:
            values = [[b.get(name, default) for b in stage] for stage in stages]
            if any(v != stage[0] for stage in values for v in stage):
                raise Unsupported(f"cfg: {name} differs within a stage: {values}")
            return [stage[0] for stage in values]

        every = cfg.get("self_attn_kwargs") or {}
        own = [every if given is None else given for given in common("self_attn_kwargs")]
        more = [
            {
                name: each[name]
                for name in ("dim_head", "qk_ratio", "qkv_bias", "avg_down", "scale_pos_embed")
                if name in each
            }
            for each, stage in zip(own, stages, strict=True)
            if any(b["type"] == "self_attn" for b in stage)
        ]
        if any(each != more[0] for each in more):
            raise Unsupported(f"cfg: settings of the attention differ between stages: {more}")
        attention = dict(more[0]) if more else {}
        model = cls(
            num_classes,
            in_chans,
            dims=common("c"),
            depths=[len(stage) for stage in stages],
            strides=common("s", 2),
            halo=[[b["type"] == "self_attn" for b in stage] for stage in stages],
            num_heads=[each.get("num_heads", 8) for each in own],
            head_dim=attention.pop("dim_head", None),
            block_size=[each.get("block_size", 8) for each in own],
            halo_size=[each.get("halo_size", 3) for each in own],
            bottleneck_ratio=common("br", 1.0),
            stem_dim=cfg.get("stem_chs") or stages[0][0]["c"],
            stem=cfg.get("stem_type", "3x3"),
            stem_pool=bool(cfg.get("stem_pool", "maxpool")),
            act=cfg.get("act_layer", "relu"),
            projection=cfg.get("num_features", 0),
            drop_path_rate=drop_path_rate,
            attention=attention,
        )
        rename = {"stem.conv": "stem.0.conv", "stem.bn": "stem.0.bn", "head.fc": "head", "final_conv": "proj.0"}
        rename |= {f"stem.conv{i + 1}": f"stem.{2 * i}" for i in range(3)}
        for i, stage in enumerate(stages):
            for j in range(len(stage)):
                block = f"stages.{i}.{j}"
                rename |= {
                    f"{block}.conv1_1x1": f"{block}.conv1",
                    f"{block}.conv2_kxk": f"{block}.mix",
                    f"{block}.self_attn": f"{block}.mix",
                    f"{block}.self_attn.pos_embed": f"{block}.mix",
                    f"{block}.post_attn": f"{block}.norm",
                    f"{block}.conv3_1x1": f"{block}.conv2",
                }
        load_strictly(model, state_dict, rename)
        return model
