"""Memories that are written while the sequence is read."""
