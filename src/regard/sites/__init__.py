"""Where attention happens inside a pretrained model, and the stages at which methods act on it."""

from regard.sites.call import Call, Step
from regard.sites.calls import register
from regard.sites.find import find_sites
from regard.sites.method import Method
from regard.sites.session import apply
from regard.sites.site import Rotary, Site

__all__ = ["Call", "Method", "Rotary", "Site", "Step", "apply", "find_sites", "register"]
