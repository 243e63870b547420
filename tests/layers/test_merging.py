"""Merging tokens of a grid."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.layers.merging import GridMerge


def test_merging_averages_the_most_similar_and_unmerging_copies() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    merging = GridMerge.match(x, (4, 5), (2, 2))
    assert merging.destinations.tolist() == [0, 2, 10, 12]
    count = 7
    merged = merging.merge(x, count)
    assert merged.shape == (2, 13, 3)
    back = merging.unmerge(merged, count)
    unit = x / x.norm(dim=-1, keepdim=True)
    for b in range(2):
        similarity = {}
        for s in range(20):
            if s not in merging.destinations.tolist():
                best = max(merging.destinations.tolist(), key=lambda d: unit[b, s] @ unit[b, d])
                similarity[s] = (float(unit[b, s] @ unit[b, best]), best)
        chosen = sorted(similarity, key=lambda s: -similarity[s][0])[:count]
        for d in merging.destinations.tolist():
            members = [d] + [s for s in chosen if similarity[s][1] == d]
            for m in members:
                torch.testing.assert_close(back[b, m], x[b, members].mean(0))
        for s in set(similarity) - set(chosen):
            torch.testing.assert_close(back[b, s], x[b, s])


def test_nothing_merged_is_undone_exactly() -> None:
    x = torch.randn(1, 12, 4)
    merging = GridMerge.match(x, (3, 4), (3, 2), torch.tensor([[3, 0]]))
    assert merging.destinations.tolist() == [5, 2]
    torch.testing.assert_close(merging.unmerge(merging.merge(x, 0), 0), x, atol=0, rtol=0)
    assert merging.merge(x, 100).shape == (1, 2, 4)


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError, match="x: expected"):
        GridMerge.match(torch.randn(1, 5, 2), (2, 3), (1, 1))
    with pytest.raises(ArgumentError, match="cell"):
        GridMerge.match(torch.randn(1, 6, 2), (2, 3), (3, 1))
