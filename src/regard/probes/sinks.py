"""Attention sinks of a recording (as in arXiv:2406.15765): at any length, because a column sum is what is recorded."""

from torch import Tensor

from regard.methods.language.act.calibration import Threshold, above, at_or_after, check_threshold
from regard.probes.recording import Recording


def recorded_averages(recording: Recording) -> dict[int, Tensor]:
    """By layer, the mean weight (B, H, M) of each key over the real queries at or after it, ``c_j = mass_j / (N - j)``.

    The same as `regard.methods.language.act.column_average` of the weights.
    """
    return {
        i: layer.mass / at_or_after((layer.peak > 0).int()).clamp_min(1)  # a query that is padding has no weights
        for i, layer in recording.layers.items()
    }


def recorded_sinks(recording: Recording, threshold: Threshold = 0.1) -> dict[int, Tensor]:
    """By layer, which keys of each head (B, H, M) are attention sinks, ``c_j > threshold``, the first one included.

    Args:
        threshold: a mean weight, or ``"5/N"`` for five times the uniform weight over the N real tokens.

    Raises:
        ArgumentError: the threshold is neither.
    """
    check_threshold(threshold)
    averages = recorded_averages(recording)
    return {i: above(average, threshold, recording.counted) for i, average in averages.items()}
