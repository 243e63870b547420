"""The published systems regard sets out to cover, and which of them work.

>>> import regard
>>> regard.catalog.get("h2o").year
2023
"""

from regard.catalog.loader import FAMILIES, KINDS, STATUSES, System, get, model_names, names, systems

__all__ = ["FAMILIES", "KINDS", "STATUSES", "System", "get", "model_names", "names", "systems"]
