"""MQSA-TED: the TensorFlow class without dropout, its losses and its scores."""

from collections.abc import Iterable

import regard
from regard.models.recommendation.mqsa import ted_losses
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    model = regard.from_official("mqsa-ted", golden.state(), variant="model", **golden.kwargs)
    given = golden.inputs
    losses = ted_losses(
        model,
        given["input_seq"],
        given["pred_seq"],
        given["item_head"],
        given["item_tail"],
        weight=golden.kwargs["lambda_kd"],
        tau=golden.kwargs["tau"],
        l2=golden.kwargs["l2_reg"],
    )
    for name, loss in (("loss", losses.total), ("loss_rec", losses.recommendation), ("loss_kd", losses.distillation)):
        yield golden.compare(name, loss.reshape(golden.outputs[name].shape), atol=ATOL)
    yield golden.compare("test_logits", model.score(given["input_seq"], given["input_u_mask"]), atol=ATOL)
