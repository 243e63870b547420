"""Mechanisms for video and other token grids that attend in windows, pooled copies and cached descriptors."""
