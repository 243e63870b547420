"""LAMA: pooled and projected sequences, and the heads' weights with and without padding."""

from collections.abc import Iterable

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-6


def check(golden: Golden) -> Iterable[Comparison]:
    pooling = regard.from_official("lama", golden.state(), **golden.kwargs).eval()
    x, valid = golden.inputs["inputs"], golden.inputs["mask"].bool()
    encoded, attention = pooling(x, valid, return_attention=True)
    yield golden.compare("encoded", encoded, ATOL)
    yield golden.compare("attention", attention, ATOL)
    yield golden.compare("attention_nomask", pooling.attention(x), ATOL)
