"""Attention between the nodes of a graph."""
