"""MoA, mixture of sparse attention (arXiv:2406.14909): a span rule for every head, found by profiling the model."""

from regard.methods.language.moa.influence import attention_influence
from regard.methods.language.moa.method import MoA
from regard.methods.language.moa.plan import MoAPlan
from regard.methods.language.moa.solve import Solution, best_plan, optimise_plan
from regard.methods.language.moa.space import ElasticSpace
from regard.methods.language.moa.spans import Spans, span_mask
from regard.methods.language.moa.stages import (
    Sample,
    calibrate,
    per_kv_head,
    profile_influence,
    search_plans,
    validate,
)

__all__ = [
    "ElasticSpace",
    "MoA",
    "MoAPlan",
    "Sample",
    "Solution",
    "Spans",
    "attention_influence",
    "best_plan",
    "calibrate",
    "optimise_plan",
    "per_kv_head",
    "profile_influence",
    "search_plans",
    "span_mask",
    "validate",
]
