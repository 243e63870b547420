"""LargeGT: the classifier in eval mode, its two halves, and one update of the codebook in training."""

from collections.abc import Iterable

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    model = regard.from_official("largegt", golden.state(), **golden.kwargs).eval()
    given = [golden.inputs.get(name) for name in ("seq", "x", "pos_enc", "batch_idx")]
    yield golden.compare("logits", model(*given), ATOL)
    halves = {"full": ("local", "global")}.get(model.conv_type, (model.conv_type,))
    for name, half in zip(halves, model.branches(*given), strict=True):
        if name in golden.outputs:
            yield golden.compare(name, half, ATOL)
    if "vq_update_in" in golden.inputs:
        codebook = model.global_module.codebook.train()
        yield golden.compare("vq_idx", codebook.update(golden.inputs["vq_update_in"]), ATOL)
        yield golden.compare("vq_embedding", codebook.embedding, ATOL)
        yield golden.compare("vq_embedding_output", codebook.centroids, ATOL)
        yield golden.compare("vq_ema_w", codebook.embedding_sum, ATOL)
        yield golden.compare("vq_ema_cluster_size", codebook.cluster_size, ATOL)
        yield golden.compare("vq_bn_mean", codebook.bn.running_mean, ATOL)
        yield golden.compare("vq_bn_var", codebook.bn.running_var, ATOL)
