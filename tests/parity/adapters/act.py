"""ACT: the column averages and the calibrated weights of the listed heads."""

from collections.abc import Iterable

from regard.methods.language.act import calibrate_attention, column_average
from tests.parity.harness import Comparison, Golden

ATOL = 1e-6


def check(golden: Golden) -> Iterable[Comparison]:
    weights, heads = golden.inputs["attn_weights"], golden.inputs["heads"].tolist()
    beta, threshold = golden.kwargs["beta"], golden.kwargs["threshold"]
    found = calibrate_attention(weights, heads, beta=beta, threshold=threshold)
    yield golden.compare("attn_weights", found, ATOL)
    average = column_average(weights)
    yield golden.compare("column_average", average.view(golden.outputs["column_average"].shape), ATOL)
