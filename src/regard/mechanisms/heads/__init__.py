"""Mechanisms that change how heads are made, shared or combined."""
