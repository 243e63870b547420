"""DHSA (arXiv:2510.24606): dynamic hierarchical sparse attention over chunks that follow the content."""

from regard.methods.language.dhsa.attention import DHSAConfig, choose_keys, dhsa_attention
from regard.methods.language.dhsa.blocks import (
    a_shape_blocks,
    topk_blocks,
    vertical_slash_blocks,
    vertical_slash_blocks_coarse,
)
from regard.methods.language.dhsa.boundaries import (
    label_boundaries,
    mass_ratio,
    predict_boundaries,
    select_boundaries,
    uniform_boundaries,
)
from regard.methods.language.dhsa.losses import focal_bce, soft_label
from regard.methods.language.dhsa.method import DHSA
from regard.methods.language.dhsa.predictor import (
    BoundaryPredictor,
    BoundarySimilarity,
    BoundarySimilarityAttn,
    BoundarySimilarityStack,
)
from regard.methods.language.dhsa.train import examples, train_predictor
from regard.methods.language.dhsa.weights import load_predictor, save_predictor

__all__ = [
    "DHSA",
    "BoundaryPredictor",
    "BoundarySimilarity",
    "BoundarySimilarityAttn",
    "BoundarySimilarityStack",
    "DHSAConfig",
    "a_shape_blocks",
    "choose_keys",
    "dhsa_attention",
    "examples",
    "focal_bce",
    "label_boundaries",
    "load_predictor",
    "mass_ratio",
    "predict_boundaries",
    "save_predictor",
    "select_boundaries",
    "soft_label",
    "topk_blocks",
    "train_predictor",
    "uniform_boundaries",
    "vertical_slash_blocks",
    "vertical_slash_blocks_coarse",
]
