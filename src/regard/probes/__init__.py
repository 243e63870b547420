"""Methods that only watch: where a model looks, without the matrix of weights."""

from regard.probes.attribution_scores import Perturbation, insertion_deletion, pointing_game
from regard.probes.context_saliency import context_aware_saliency, salient_relevance
from regard.probes.explanation import (
    Deletion,
    aggregate_cross_attention,
    auc,
    deletion_curve,
    explanation_correlation,
    pool_saliency,
)
from regard.probes.gestalt import activation_map, convexity_index, figure_ground_auc, illusory_contour_index
from regard.probes.indicators import attention_indicators
from regard.probes.occlusion import (
    frame_masks,
    grid_segments,
    hide,
    kl_scorer,
    occlusion_saliency,
    slic_masks,
    slic_segments,
    standardise_token_maps,
)
from regard.probes.pattern import Pattern, PatternProbe
from regard.probes.pattern_clusters import AttentionPatternAutoencoder, PatternSummary, pattern_summary
from regard.probes.reach import reach
from regard.probes.recorder import Recorder, record
from regard.probes.recording import LayerRecord, Recording
from regard.probes.relevance import lrp
from regard.probes.retrieval_heads import HeadScores, RetrievalScore, TopKeys, detect_retrieval_heads, find_needle
from regard.probes.rhythm import (
    Rhythm,
    attention_span,
    fai,
    record_rhythm,
    rhythm_credit,
    split_heads,
    token_entropy,
    waad,
)
from regard.probes.routing import routing_entropy, routing_fluctuation
from regard.probes.saliency import backprop_saliency, gradcam, gradient, linear_approx, normgrad
from regard.probes.sensitivity import class_sensitivity, meta_saliency
from regard.probes.sinks import recorded_averages, recorded_sinks
from regard.probes.vit_heads import AttentionStrength, HeadImportance, attention_strength, rank_heads

__all__ = [
    "AttentionPatternAutoencoder",
    "AttentionStrength",
    "Deletion",
    "HeadImportance",
    "HeadScores",
    "LayerRecord",
    "Pattern",
    "PatternProbe",
    "PatternSummary",
    "Perturbation",
    "Recorder",
    "Recording",
    "RetrievalScore",
    "Rhythm",
    "TopKeys",
    "activation_map",
    "aggregate_cross_attention",
    "attention_indicators",
    "attention_span",
    "attention_strength",
    "auc",
    "backprop_saliency",
    "class_sensitivity",
    "context_aware_saliency",
    "convexity_index",
    "deletion_curve",
    "detect_retrieval_heads",
    "explanation_correlation",
    "fai",
    "figure_ground_auc",
    "find_needle",
    "frame_masks",
    "gradcam",
    "gradient",
    "grid_segments",
    "hide",
    "illusory_contour_index",
    "insertion_deletion",
    "kl_scorer",
    "linear_approx",
    "lrp",
    "meta_saliency",
    "normgrad",
    "occlusion_saliency",
    "pattern_summary",
    "pointing_game",
    "pool_saliency",
    "rank_heads",
    "reach",
    "record",
    "record_rhythm",
    "recorded_averages",
    "recorded_sinks",
    "rhythm_credit",
    "routing_entropy",
    "routing_fluctuation",
    "salient_relevance",
    "slic_masks",
    "slic_segments",
    "split_heads",
    "standardise_token_maps",
    "token_entropy",
    "waad",
]
