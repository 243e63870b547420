"""Position encodings: functions of tensors and positions, free of any model."""

from regard.positions.alibi import alibi_slopes
from regard.positions.axial import axial_angles, grid_coordinates, pairs_to_halves
from regard.positions.rotary import rotary_angles, rotate, rotate_tokens, unrotate

__all__ = [
    "alibi_slopes",
    "axial_angles",
    "grid_coordinates",
    "pairs_to_halves",
    "rotary_angles",
    "rotate",
    "rotate_tokens",
    "unrotate",
]
