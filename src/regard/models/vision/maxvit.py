"""MaxViT (arXiv:2204.01697): convolution, window attention and grid attention in every block."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import BatchNorm2d, Conv2d, DropPath, drop_path_rates
from regard.layers.relative_position import reversed_table
from regard.layers.scale import LayerScale
from regard.layers.squeeze_excite import SqueezeExcite
from regard.mechanisms.grid.partition import BlockAttention, GridAttention
from regard.models.vision.backbone import Backbone


class TanhGELU(nn.GELU):
    """GELU in the tanh approximation, with which MaxViT was trained."""

    def __init__(self) -> None:
        super().__init__("tanh")


ACTS: dict[str, type[nn.Module]] = {"gelu_tanh": TanhGELU, "gelu": nn.GELU}


class SameConv2d(Conv2d):
    """A convolution of (B, H, W, C) to ⌈side / stride⌉; an odd row of zeros goes to the bottom and right."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, stride: int = 1, **kwargs: Any):
        super().__init__(dim_in, dim_out, kernel_size, stride, padding=0, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_filled(x, self.kernel_size[0], self.stride[0]))


class MBConv(nn.Module):
    """``shortcut(x) + W2 SE(act(BN(dwconv(act(BN(W1 BN(x)))))))``, an inverted bottleneck; the stride is dwconv's.

    (B, H, W, dim_in) to (B, H / stride, W / stride, dim).

    Args:
        dim_in, dim, stride: see above.
        act: "gelu_tanh" or "gelu".
        kernel_size: of the depthwise convolution.
        expand_ratio: width inside, times dim (dim_in with ``expand_output=False``), rounded to a multiple of 8.
        se_ratio: width inside squeeze and excite, times dim.
        norm_eps: of the batch norms.
        bias: of W2 and of the shortcut.
        same: pad as TensorFlow does, where the stride meets even sides only at the bottom and right.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        stride: int = 1,
        act: str = "gelu_tanh",
        kernel_size: int = 3,
        expand_ratio: float = 4.0,
        expand_output: bool = True,
        se_ratio: float = 0.25,
        norm_eps: float = 1e-3,
        bias: bool = True,
        same: bool = True,
        drop_path: float = 0.0,
    ):
        super().__init__()
        inner = _rounded((dim if expand_output else dim_in) * expand_ratio)
        conv: Any = SameConv2d if same else Conv2d
        self.stride, self.same = stride, same
        self.shortcut = nn.Linear(dim_in, dim, bias=bias) if stride > 1 and dim_in != dim else nn.Identity()
        self.norm0 = BatchNorm2d(dim_in, norm_eps)
        self.fc1 = nn.Linear(dim_in, inner, bias=False)
        self.norm1 = BatchNorm2d(inner, norm_eps)
        self.dwconv = conv(inner, inner, kernel_size, stride, groups=inner, bias=False)
        self.norm2 = BatchNorm2d(inner, norm_eps)
        self.act = ACTS[act]()
        self.se = SqueezeExcite(inner, int(se_ratio * (dim if expand_output else inner)), nn.SiLU)
        self.fc2 = nn.Linear(inner, dim, bias=bias)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm1(self.fc1(self.norm0(x))))
        h = self.fc2(self.se(self.act(self.norm2(self.dwconv(h)))))
        if self.stride > 1:
            x = F.avg_pool2d((_filled(x, 2, 2) if self.same else x).movedim(-1, 1), 2).movedim(1, -1)
        return self.shortcut(x) + self.drop_path(h)


class PartitionLayer(nn.Module, PyTorchModelHubMixin):
    """``x += attention(LN x); x += MLP(LN x)``, attention inside windows ("block") or across them ("grid").

    Args:
        dim: C of x (B, H, W, C).
        kind: "block" or "grid".
        size: of the window or grid, one number or (height, width).
        head_dim: D.
        mlp_ratio: width of the MLP.
        act: "gelu_tanh" or "gelu".
        norm_eps: of the layer norms.
        bias: whether attention's projections have biases.
        relative_bias: whether attention has a bias for relative positions.
        layer_scale: initial scale of both branches, None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        kind: str,
        size: int | Sequence[int] = 7,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        act: str = "gelu_tanh",
        norm_eps: float = 1e-5,
        bias: bool = True,
        relative_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if kind not in ("block", "grid"):
            raise ArgumentError(f"kind: expected 'block' or 'grid', got {kind!r}")
        if dim % head_dim:
            raise ArgumentError(f"head_dim: {head_dim} does not divide dim {dim}")
        attention = BlockAttention if kind == "block" else GridAttention
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.attn = attention(dim, dim // head_dim, size, bias, bias, relative_bias)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act=ACTS[act])
        scales = (LayerScale(dim, layer_scale) if layer_scale else nn.Identity() for _ in range(2))
        self.ls1, self.ls2 = scales
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, dim: int, cfg: Mapping[str, Any], partition_type: str = "block"
    ) -> "PartitionLayer":
        """timm's ``PartitionAttentionCl``; ``cfg`` are the arguments of its ``MaxxVitTransformerCfg``."""
        options, window, grid = _attention_options(cfg)
        layer = cls(dim, partition_type, window if partition_type == "block" else grid, **options)
        load_strictly(layer, _translated(state_dict, cfg), _TABLE)
        return layer


class MaxViTBlock(nn.Sequential):
    """`MBConv`, then block attention, then grid attention; the options of the layers in ``conv`` and ``attention``."""

    def __init__(
        self,
        dim_in: int,
        dim: int,
        stride: int = 1,
        window_size: int | Sequence[int] = 7,
        grid_size: int | Sequence[int] = 7,
        drop_path: float = 0.0,
        conv: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
    ):
        options = {**(attention or {}), "drop_path": drop_path}
        super().__init__(
            MBConv(dim_in, dim, stride, **{**(conv or {}), "drop_path": drop_path}),
            PartitionLayer(dim, "block", window_size, **options),
            PartitionLayer(dim, "grid", grid_size, **options),
        )


class MaxViT(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes); windows and grids must divide every stage.

    A convolutional stem (stride 2) and stages of `MaxViTBlock` that halve the image first: every block mixes nearby
    tokens by convolution and inside windows, and the whole image across a grid. With P = 7, H and W are multiples of
    224; for other sizes P is usually side / 32, and `load_resized` takes over weights that were trained with another P.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        embed_dims, depths: of each stage.
        stem_width: channels of the stem.
        partition_size: P of the windows, one number or (height, width).
        grid_size: of the grids, P by default.
        head_hidden: channels of the layer before the last, with tanh; None for none.
        drop_path_rate: of the last block; rises linearly from 0.
        stem_bias: whether the stem's convolutions have biases.
        conv, attention: further arguments of `MBConv` and `PartitionLayer`, the same in all blocks.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "maxvit-tiny": {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 5, 2), "drop_path_rate": 0.2},
        "maxvit-small": {
            "embed_dims": (96, 192, 384, 768),
            "depths": (2, 2, 5, 2),
            "head_hidden": 768,
            "drop_path_rate": 0.3,
        },
        "maxvit-base": {
            "embed_dims": (96, 192, 384, 768),
            "depths": (2, 6, 14, 2),
            "head_hidden": 768,
            "drop_path_rate": 0.4,
        },
        "maxvit-large": {
            "embed_dims": (128, 256, 512, 1024),
            "depths": (2, 6, 14, 2),
            "stem_width": 128,
            "head_hidden": 1024,
            "drop_path_rate": 0.6,
        },
        "maxvit-xlarge": {
            "embed_dims": (192, 384, 768, 1536),
            "depths": (2, 6, 14, 2),
            "stem_width": 192,
            "head_hidden": 1536,
            "drop_path_rate": 0.6,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_width: int | Sequence[int] = 64,
        partition_size: int | Sequence[int] = 7,
        grid_size: int | Sequence[int] | None = None,
        head_hidden: int | None = 512,
        drop_path_rate: float = 0.0,
        stem_bias: bool = True,
        conv: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
        features_only: bool = False,
    ):
        super().__init__()
        if len(depths) != len(embed_dims):
            raise ArgumentError(f"depths: expected one for each of {len(embed_dims)} stages, got {len(depths)}")
        widths = (stem_width, stem_width) if isinstance(stem_width, int) else tuple(stem_width)
        settings = {"norm_eps": 1e-3, "act": "gelu_tanh", "same": True, **(conv or {})}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = embed_dims[-1] if head_hidden is None else head_hidden
        self.channels = tuple(embed_dims)
        self.strides = tuple(4 * 2**i for i in range(len(embed_dims)))
        self.features_only = features_only
        convolution: Any = SameConv2d if settings["same"] else Conv2d
        self.stem = nn.Sequential(
            convolution(in_chans, widths[0], 3, 2, bias=stem_bias),
            BatchNorm2d(widths[0], settings["norm_eps"]),
            ACTS[settings["act"]](),
            convolution(widths[0], widths[-1], 3, bias=stem_bias),
        )
        size = partition_size, partition_size if grid_size is None else grid_size
        rates = drop_path_rates(drop_path_rate, depths)
        dims = (widths[-1], *embed_dims)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    MaxViTBlock(dim if j else before, dim, 1 if j else 2, *size, rates[i][j], settings, attention)
                    for j in range(depths[i])
                )
            )
            for i, (before, dim) in enumerate(zip(dims, embed_dims, strict=False))
        )
        self.norm = nn.LayerNorm(embed_dims[-1], (attention or {}).get("norm_eps", 1e-5))
        self.pre_logits = None if head_hidden is None else nn.Linear(embed_dims[-1], head_hidden)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor) -> Tensor:
        if self.pre_logits is None:
            return self.head(self.norm(x).mean((1, 2)))
        return self.head(self.pre_logits(self.norm(x.mean((1, 2)))).tanh())

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        cfg: Mapping[str, Any],
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> "MaxViT":
        """timm's ``MaxxVit`` with blocks "M"; ``cfg`` are the arguments of its ``MaxxVitCfg``, nested."""
        dims, depths = cfg.get("embed_dim", (96, 192, 384, 768)), cfg.get("depths", (2, 3, 5, 2))
        kinds = {kind for stage in cfg.get("block_type", ("C", "C", "T", "T")) for kind in stage}
        if kinds != {"M"}:
            raise Unsupported(f"cfg: block_type {cfg.get('block_type')!r}, only blocks 'M' are MaxViT's")
        transformer = cfg.get("transformer_cfg", {})
        ratio = transformer.get("partition_ratio", 32)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        options, window, grid = _attention_options(transformer, tuple(side // ratio for side in sides))
        model = cls(
            num_classes,
            in_chans,
            dims,
            depths,
            cfg.get("stem_width", 64),
            window,
            grid,
            cfg.get("head_hidden_size"),
            drop_path_rate,
            cfg.get("stem_bias", False),
            _conv_options(cfg.get("conv_cfg", {})),
            options,
        )
        rename = {"stem.conv1": "stem.0", "stem.norm1": "stem.1", "stem.conv2": "stem.3"}
        rename |= {"head.fc": "head", "head.norm": "norm", "head.pre_logits.fc": "pre_logits"}
        for block in (f"stages.{i}.{{}}{j}" for i, depth in enumerate(depths) for j in range(depth)):
            old, new = block.format("blocks."), block.format("")
            rename |= {f"{old}.conv.{a}": f"{new}.0.{b}" for a, b in _MBCONV.items()}
            for n, layer in enumerate(("attn_block", "attn_grid"), 1):
                rename |= {f"{old}.{layer}": f"{new}.{n}"}
                rename |= {f"{old}.{layer}.{a}": f"{new}.{n}.{b}" for a, b in _TABLE.items()}
        load_strictly(model, _translated(state_dict, transformer), rename)
        return model


_TABLE = {"attn.rel_pos.relative_position_bias_table": "attn.rel_pos.table"}
_MBCONV = {
    "shortcut.expand": "shortcut",
    "pre_norm": "norm0",
    "conv1_1x1": "fc1",
    "norm1": "norm1",
    "conv2_kxk": "dwconv",
    "norm2": "norm2",
    "se": "se",
    "conv3_1x1": "fc2",
}


def _attention_options(
    cfg: Mapping[str, Any], size: Sequence[int] | None = None
) -> tuple[dict[str, Any], Sequence[int], Sequence[int]]:
    """Arguments of `PartitionLayer`, window size and grid size from timm's transformer configuration."""
    _refuse(cfg, attn_drop=0.0, proj_drop=0.0, norm_layer_cl="layernorm", no_block_attn=False, use_nchw_attn=False)
    kind = cfg.get("rel_pos_type", "bias")
    if kind not in ("bias", "bias_tf", "", None):
        raise Unsupported(f"cfg: rel_pos_type {kind!r}, expected 'bias', 'bias_tf' or none")
    window = cfg.get("window_size") or size
    grid = cfg.get("grid_size") or window
    if window is None or grid is None:
        raise ArgumentError("cfg: expected window_size")
    options = {
        "head_dim": cfg.get("dim_head", 32),
        "mlp_ratio": cfg.get("expand_ratio", 4.0),
        "act": _act(cfg),
        "norm_eps": cfg.get("norm_eps", 1e-6),
        "bias": cfg.get("attn_bias", True),
        "relative_bias": bool(kind),
        "layer_scale": cfg.get("init_values"),
    }
    return options, window, grid


def _conv_options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MBConv` from timm's convolution configuration."""
    _refuse(cfg, block_type="mbconv", group_size=1, pre_norm_act=False, stride_mode="dw", pool_type="avg2")
    _refuse(cfg, attn_early=False, attn_layer="se", attn_act_layer="silu")
    if (norm := cfg.get("norm_layer") or "batchnorm2d") != "batchnorm2d":
        raise Unsupported(f"cfg: norm_layer only 'batchnorm2d', got {norm!r}")
    eps = cfg.get("norm_eps")
    return {
        "act": _act(cfg),
        "kernel_size": cfg.get("kernel_size", 3),
        "expand_ratio": cfg.get("expand_ratio", 4.0),
        "expand_output": cfg.get("expand_output", True),
        "se_ratio": cfg.get("attn_ratio", 0.25),
        "norm_eps": 1e-5 if eps is None else eps,
        "bias": cfg.get("output_bias", True),
        "same": cfg.get("padding", "") == "same",
    }


def _act(cfg: Mapping[str, Any]) -> str:
    act = cfg.get("act_layer", "gelu")
    if act not in ACTS:
        raise Unsupported(f"cfg: act_layer {act!r}, expected one of {', '.join(ACTS)}")
    return act


def _refuse(cfg: Mapping[str, Any], **known: Any) -> None:
    for name, value in known.items():
        if cfg.get(name, value) != value:
            raise Unsupported(f"cfg: {name} only {value!r}, as in the published models, got {cfg[name]!r}")


def _translated(state: dict[str, Tensor], cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tables count query minus key, and rows of qkv are (3, heads, D)."""
    new = {}
    for name, t in state.items():
        if name.endswith("relative_position_bias_table") and t.dim() == 3:
            t = reversed_table(t)
        elif ".qkv." in name and cfg.get("head_first", True):
            t = t.unflatten(0, (-1, 3, cfg.get("dim_head", 32))).transpose(0, 1).flatten(0, 2)
        new[name] = t
    return new


def _filled(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Zeros around (B, H, W, C) for ⌈side / stride⌉ outputs, the odd one at the end."""
    height, width = (max(0, (-(-s // stride) - 1) * stride + kernel_size - s) for s in x.shape[1:3])
    if not (height or width):
        return x
    return F.pad(x, (0, 0, width // 2, width - width // 2, height // 2, height - height // 2))


def _rounded(width: float) -> int:
    """The next multiple of 8, but not below 90 % of the width."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
