"""Mixtures of experts whose routing or whose experts mix tokens."""
