"""Methods that only watch: where a model looks, without the matrix of weights."""

from regard.probes.indicators import attention_indicators
from regard.probes.pattern import Pattern, PatternProbe

__all__ = ["Pattern", "PatternProbe", "attention_indicators"]
