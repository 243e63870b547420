"""Finds the attention sites of a model, whatever library it is from."""

from dataclasses import replace

from torch import nn

from regard.errors import Unsupported
from regard.sites import calls
from regard.sites import transformers as interface
from regard.sites.site import Site


def find_sites(model: nn.Module) -> list[Site]:
    """The model's attention sites: in layer order where every layer has one, else in the order of its modules.

    Raises:
        Unsupported: an attention module that is not known to regard, or none at all.
    """
    found: list[tuple[str, nn.Module]] = []
    strangers = []
    whole: tuple[str, ...] = ()  # what the names of parts of call sites begin with
    for name, module in model.named_modules():
        if name.startswith(whole):
            continue
        if interface.uses_interface(module):
            found.append((name, module))
        elif calls.is_call_site(module):
            found.append((name, module))
            whole += (f"{name}.",)
        elif type(module).__name__.endswith("Attention"):
            strangers.append((name, module))
    around = {outer for outer, _ in strangers for name, _ in found if name.startswith(f"{outer}.")}
    if unknown := [(name, module) for name, module in strangers if name not in around]:
        listed = ", ".join(f"{name} ({type(module).__name__})" for name, module in unknown)
        raise Unsupported(
            f"attention modules that regard does not know: {listed}. If their forward calls "
            "torch.nn.functional.scaled_dot_product_attention or regard.attention once, say so with "
            f"regard.sites.register({type(unknown[0][1]).__name__})"
        )
    if not found:
        raise Unsupported(
            f"no attention module found in {type(model).__name__}; name its class with regard.sites.register"
        )
    sites = []
    for i, (name, module) in enumerate(found):
        if interface.uses_interface(module):
            sites.append(interface.make_site(model, name, module, i))
        else:
            sites.append(calls.make_site(name, module, i))
    if len({site.layer for site in sites}) == len(sites):  # one a layer
        return sorted((replace(site, index=site.layer) for site in sites), key=lambda site: site.index)
    return sites
