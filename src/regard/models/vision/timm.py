"""Weights as timm names them, for backbones whose authors published them under other names."""

import re
from collections.abc import Callable

from torch import Tensor

from regard.errors import Unsupported
from regard.layers import load_strictly
from regard.models.vision.backbone import Backbone
from regard.models.vision.davit import DaViT
from regard.models.vision.gc_vit import GCViT
from regard.models.vision.shvit import SHViT

_Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]


def _before(match: re.Match[str]) -> str:
    """timm has a downsampling inside the stage after it."""
    return f"downsamples.{int(match[1]) - 1}."


_DAVIT: _Rules = [
    (r"^stages\.(\d+)\.downsample\.", _before),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(\d)\.", lambda m: f"stages.{m[1]}.{2 * int(m[2]) + int(m[3])}."),
    (r"\.cpe([12])\.proj\.", lambda m: f".cpe.{int(m[1]) - 1}."),
    (r"^(stem|downsamples\.\d+)\.conv\.", r"\1.proj."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
]
_GC_VIT: _Rules = [
    (r"^stages\.(\d+)\.downsample\.", _before),
    (r"^stages\.(\d+)\.global_block\.blocks\.conv(\d)\.", lambda m: f"stages.{m[1]}.queries.convs.{int(m[2]) - 1}."),
    (r"\.conv_block\.", ".conv."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.conv_pw\.", ".proj."),
    (r"^stem\.conv1\.", "stem.0."),
    (r"^stem\.down\.", "stem.1."),
    (r"\.rel_pos\.relative_position_bias_table$", ".rel_pos.table"),
    (r"\.ls([12])\.", r".scale\1."),
    (r"^stages\.\d+\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
]
_MERGING = {"conv1": "0", "conv2": "2", "se": "4", "conv3": "5"}  # SHViT's, timm's third of five modules
_SHVIT: _Rules = [
    (r"^stages\.(\d+)\.downsample\.", _before),
    (r"^(downsamples\.\d+)\.2\.(conv1|conv2|se|conv3)\.", lambda m: f"{m[1]}.1.{_MERGING[m[2]]}."),
    (r"^(downsamples\.\d+)\.([01])\.m\.", lambda m: f"{m[1]}.0.{('conv', 'ffn')[int(m[2])]}.m."),
    (r"^(downsamples\.\d+)\.([34])\.m\.", lambda m: f"{m[1]}.2.{('conv', 'ffn')[int(m[2]) - 3]}.m."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^patch_embed\.", "stem."),
    (r"^head\.l\.", "head.linear."),
    (r"\.proj\.1\.", ".proj."),
    (r"\.pw1\.", ".0."),
    (r"\.pw2\.", ".2."),
    (r"\.m\.", ".branch."),
    (r"\.c\.", ".conv."),
]
_RULES: dict[type[Backbone], _Rules] = {DaViT: _DAVIT, GCViT: _GC_VIT, SHViT: _SHVIT}


def load_timm(model: Backbone, state_dict: dict[str, Tensor]) -> Backbone:
    """Load weights named as in timm's model of the same architecture, every one of them.

        model = load_timm(regard.create("davit-tiny"), timm.create_model("davit_tiny").state_dict())

    MaxViT and HaloNet are published in timm: for them, use `regard.from_official` with timm's configuration.

    Args:
        model: a DaViT, GCViT or SHViT; it is changed, and returned.
        state_dict: of timm's model.

    Raises:
        Unsupported: timm has no model of this class, or none under other names.
        ArgumentError: weights are missing or left over, or have other shapes.
    """
    rules = next((rules for cls, rules in _RULES.items() if isinstance(model, cls)), None)
    if rules is None:
        known = ", ".join(cls.__name__ for cls in _RULES)
        raise Unsupported(f"model: timm's names are known for {known}, got {type(model).__name__}")
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    load_strictly(model, renamed)
    return model
