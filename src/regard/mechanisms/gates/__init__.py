"""Mechanisms that reweight tokens or channels without comparing pairs of them."""
