"""Latent attention as transformers' DeepSeek-V3 computes it, and TPLA with one shard, which is the same."""

from collections.abc import Iterable

import regard
from regard.mechanisms.heads.latent import MultiHeadLatentAttention
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    x, rotary = golden.inputs["hidden_states"], (golden.inputs["cos"], golden.inputs["sin"])
    mla = MultiHeadLatentAttention.from_official(golden.state(), **golden.kwargs).eval()
    yield golden.compare("mla", mla(x, rotary=rotary), ATOL)
    yield golden.compare("mla", mla.stream(x, rotary=rotary)[0], ATOL)
    tpla = regard.from_official("tpla", golden.state(), **golden.kwargs).eval()
    yield golden.compare("mla", tpla(x, rotary=rotary), ATOL)
