"""Landmark attention: the grouped softmax and its gradient, and the model."""

from collections.abc import Iterable

import torch
from torch.nn import functional as F

import regard
from regard.mechanisms.sparse.landmark import landmark_grouped_softmax
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5
NOT_COMPARED = {
    "cached_logits": "in the first layer all landmarks have the same key, so among old blocks the published top-k goes "
    "by rounding errors of its matrix product; test_landmark.py compares the chunks before that happens"
}


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, inputs = golden.kwargs, golden.inputs
    scores = inputs["scores"].clone().requires_grad_()
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    probs = landmark_grouped_softmax(scores, inputs["idx"] == kwargs["landmark_id"], seen)
    yield golden.compare("grouped_probs", probs, ATOL)
    yield golden.compare("grad_scores", torch.autograd.grad((probs * inputs["probs_weight"]).sum(), scores)[0], ATOL)

    model = regard.from_official("landmark-attention", golden.state(), variant="model", **kwargs).eval()
    logits = model(inputs["idx"])
    yield golden.compare("logits", logits, ATOL)
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), ignore_index=-1)
    yield golden.compare("loss", loss.view(golden.outputs["loss"].shape), ATOL)
