"""Occlusion saliency of published probabilities and masks, of the spectrogram and of the tokens before."""

from collections.abc import Iterable

from torch import Tensor

from regard.probes import kl_scorer, occlusion_saliency, standardise_token_maps
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    original, perturbed = golden.inputs["orig_probs"], golden.inputs["perturbed_probs"]

    def saliency(masks: Tensor) -> Tensor:
        # all at once: the published deviations lose digits, so that even the order of summation shows in them
        return occlusion_saliency(lambda *_: perturbed, masks, original=original, batch_size=len(masks))

    yield golden.compare("kl", kl_scorer(original, perturbed).view(golden.outputs["kl"].shape), ATOL)
    for name, masks, causal in (("fbank", "occlusion_masks", False), ("target", "target_occlusion_masks", True)):
        found = saliency(golden.inputs[masks])
        yield golden.compare(f"{name}_saliency", found, ATOL)
        yield golden.compare(f"{name}_saliency_normalised", standardise_token_maps(found, causal=causal), ATOL)
