"""Position encodings: functions of tensors and positions, free of any model."""

from regard.positions.rotary import rotary_angles, rotate, unrotate

__all__ = ["rotary_angles", "rotate", "unrotate"]
