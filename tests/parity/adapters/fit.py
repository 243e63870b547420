"""FIT: the Keras encoder, denoiser and autoregressive model."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    given, kwargs = golden.inputs, golden.kwargs
    if "FIT" in kwargs:
        encoder = regard.from_official("fit", golden.state("fit/"), **kwargs["FIT"])
        x = given["fit/x"].clone().requires_grad_()
        out, latents = encoder(x, given.get("fit/y"))
        yield golden.compare("fit/x_out", out, atol=ATOL)
        yield golden.compare("fit/latents", latents, atol=ATOL)
        if "fit/grad_x" in golden.outputs:
            (gradient,) = torch.autograd.grad(out.sum() + latents.sum(), x)
            yield golden.compare("fit/grad_x", gradient, atol=ATOL)
    if "FITDenoiser" in kwargs:
        state = golden.state("fit_denoiser/")
        denoiser = regard.from_official("fit", state, variant="denoiser", **kwargs["FITDenoiser"])
        x, time, cond = (given[f"denoiser/{name}"] for name in ("x", "time", "cond"))
        out, latents = denoiser(x, time, cond, given.get("denoiser/latents_prev"))
        yield golden.compare("denoiser/x_out", out, atol=1e-4)
        yield golden.compare("denoiser/latents", latents, atol=1e-4)
    if "FITAR" in kwargs:
        ar = regard.from_official("fit", golden.state("fit_ar/"), variant="ar", **kwargs["FITAR"])
        yield golden.compare("ar/logits", ar(given["ar/ids"]), atol=ATOL)
