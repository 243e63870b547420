"""Mechanisms whose cost grows linearly with the sequence."""
