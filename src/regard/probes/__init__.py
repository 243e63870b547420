"""Methods that only watch: where a model looks, without the matrix of weights."""

from regard.probes.context_saliency import context_aware_saliency, salient_relevance
from regard.probes.indicators import attention_indicators
from regard.probes.pattern import Pattern, PatternProbe
from regard.probes.reach import reach
from regard.probes.recorder import Recorder, record
from regard.probes.recording import LayerRecord, Recording
from regard.probes.relevance import lrp
from regard.probes.retrieval_heads import HeadScores, RetrievalScore, TopKeys, detect_retrieval_heads, find_needle
from regard.probes.routing import routing_entropy, routing_fluctuation
from regard.probes.saliency import backprop_saliency, gradcam, gradient, linear_approx, normgrad
from regard.probes.sensitivity import class_sensitivity, meta_saliency
from regard.probes.sinks import recorded_averages, recorded_sinks

__all__ = [
    "HeadScores",
    "LayerRecord",
    "Pattern",
    "PatternProbe",
    "Recorder",
    "Recording",
    "RetrievalScore",
    "TopKeys",
    "attention_indicators",
    "backprop_saliency",
    "class_sensitivity",
    "context_aware_saliency",
    "detect_retrieval_heads",
    "find_needle",
    "gradcam",
    "gradient",
    "linear_approx",
    "lrp",
    "meta_saliency",
    "normgrad",
    "reach",
    "record",
    "recorded_averages",
    "recorded_sinks",
    "routing_entropy",
    "routing_fluctuation",
    "salient_relevance",
]
