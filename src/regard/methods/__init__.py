"""What regard does to pretrained models at run time."""

from regard.methods.registry import create, get, names, parse

__all__ = ["create", "get", "names", "parse"]
