"""Where attention happens inside pretrained models, and `apply`, which puts methods to work there."""

from regard.sites.call import Call, Step
from regard.sites.method import Method
from regard.sites.session import apply
from regard.sites.site import Rotary, Site
from regard.sites.transformers import find_sites

__all__ = ["Call", "Method", "Rotary", "Site", "Step", "apply", "find_sites"]
