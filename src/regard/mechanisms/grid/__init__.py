"""Mechanisms on token grids (B, H, W, C)."""
