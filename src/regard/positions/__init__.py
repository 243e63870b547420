"""Position encodings: functions of tensors and positions, free of any model."""

from regard.positions.rotary import rotate, unrotate

__all__ = ["rotate", "unrotate"]
