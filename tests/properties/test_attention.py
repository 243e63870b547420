"""The laws of attention: all backends are the same function, and partial results merge to the whole."""

from itertools import pairwise
from unittest.mock import patch
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.attention import Partial, attention, merge, received
from regard.attention.problem import checked
from regard.attention.reference import weights
from tests.attention.inputs import Inputs, assert_equal, everything, inputs, weight_like

EXACT = 1e-10
SINGLE = 1e-5


# the planner's limits: as they are, one tile per batch, masks evaluated in each call, tiles always done in two parts
limits = st.sampled_from(
    [{}, {"_PAIRS": 1}, {"_PATTERN_BYTES": -1, "_TERM_BYTES": -1}, {"_WORTH_SPLITTING": 1, "_SLACK": 2.0}]
)


@given(x=inputs(), limit=limits)
@settings(max_examples=200, deadline=None)
def test_blocks_equal_the_reference_in_float64(x: Inputs, limit: dict[str, float]) -> None:
    with patch.multiple("regard.attention.plan", _plans=WeakKeyDictionary(), **limit):
        assert_equal(everything(x, "blocks"), everything(x, "reference"), EXACT)


@given(x=inputs())
@settings(max_examples=60, deadline=None)
def test_tiles_in_matrix_products_equal_the_reference_in_float64(x: Inputs) -> None:
    """What runs where there is no fused kernel to call, such as on GPUs."""
    with patch("regard.attention.tile._has_kernel", return_value=False):
        assert_equal(everything(x, "blocks"), everything(x, "reference"), EXACT)


@given(x=inputs())
@settings(max_examples=60, deadline=None)
def test_the_automatic_choice_equals_the_reference_in_float64(x: Inputs) -> None:
    assert_equal(everything(x, "auto"), everything(x, "reference"), EXACT)


@given(x=inputs())
@settings(max_examples=60, deadline=None)
def test_sdpa_equals_the_reference_in_float64(x: Inputs) -> None:
    expected = everything(x, "reference", through_lse=x.bias is None)
    if x.bias is None:
        assert_equal(everything(x, "sdpa"), expected, EXACT)
        return
    # torch's kernels give no lse where a bias needs its gradient
    out = attention(x.query, x.key, x.value, mask=x.mask, bias=x.bias, scale=x.scale, backend="sdpa")
    grads = torch.autograd.grad((out * weight_like(out)).sum(), x.leaves)
    found = dict(zip(["out", "grad query", "grad key", "grad value", "grad bias"], [out.detach(), *grads], strict=True))
    del expected["lse"]
    assert_equal(found, expected, EXACT)


@pytest.mark.parametrize("backend", ["blocks", "auto"])
@given(x=inputs())
@settings(max_examples=40, deadline=None)
def test_backends_equal_the_reference_in_float32(backend: str, x: Inputs) -> None:
    assert_equal(everything(x.to(torch.float32), backend), everything(x, "reference"), SINGLE)


@given(x=inputs(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_partition_of_the_keys_merges_to_the_whole(x: Inputs, data: st.DataObject) -> None:
    m = x.key.shape[2]
    cuts = sorted({0, m, *data.draw(st.lists(st.integers(0, m), max_size=3))})
    shape = (x.query.shape[0], x.query.shape[1], x.query.shape[2], m)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m))
    allowed = checked(x.query, x.key, x.value, x.mask).allowed()
    allowed = torch.ones(shape, dtype=torch.bool) if allowed is None else allowed.expand(shape)

    def parts(query: Tensor, key: Tensor, value: Tensor, *, mask: object, **options: object) -> Partial:
        bias, scale = x.bias, x.scale
        partials = []
        for a, b in pairwise(cuts):
            keys = order[a:b]
            own_bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., keys]
            partials.append(
                attention(
                    query,
                    key[:, :, keys],
                    value[:, :, keys],
                    mask=allowed[..., keys],
                    bias=own_bias,
                    scale=scale,
                    return_lse=True,
                )
            )
        return merge(*partials)

    assert_equal(everything(x, parts), everything(x, "reference"), EXACT)


@st.composite
def partials(draw: st.DrawFn) -> list[Partial]:
    """Three partials over the same queries, some rows of which see nothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    found = []
    for _ in range(3):
        out = torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64)
        lse = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1.0, 300.0]))
        unseen = torch.rand(lse.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        lse, out = lse.masked_fill(unseen, -torch.inf), out.masked_fill(unseen.unsqueeze(-1), 0.0)
        found.append(Partial(out.requires_grad_(), lse.requires_grad_()))
    return found


def with_gradients(parts: list[Partial], merged: Partial) -> dict[str, Tensor]:
    out, lse = merged
    loss = (out * weight_like(out)).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weight_like(lse)).sum()
    grads = torch.autograd.grad(loss, [t for part in parts for t in part], allow_unused=True)
    assert all(g is not None for g in grads)
    return {"out": out.detach(), "lse": lse.detach()} | {f"grad {i}": g for i, g in enumerate(grads)}


@given(parts=partials())
@settings(max_examples=100, deadline=None)
def test_merge_is_associative_and_commutative(parts: list[Partial]) -> None:
    a, b, c = parts
    expected = with_gradients(parts, merge(a, b, c))
    for other in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b)):
        assert_equal(with_gradients(parts, other), expected, EXACT)


@given(parts=partials())
@settings(max_examples=60, deadline=None)
def test_the_empty_partial_is_the_identity_of_merge(parts: list[Partial]) -> None:
    a = parts[0]
    empty = Partial.empty(*a.out.shape, dtype=torch.float64)
    unseen = a.lse == -torch.inf  # such rows are constant, and have no gradient
    expected = with_gradients([a], Partial(a.out.masked_fill(unseen[..., None], 0.0), a.lse * 1))
    for merged in (merge(a, empty), merge(empty, a), merge(empty, a, empty)):
        assert_equal(with_gradients([a], merged), expected, EXACT)


@given(x=inputs(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_received_is_the_column_sum_of_the_weights(x: Inputs, data: st.DataObject) -> None:
    n = x.query.shape[2]
    queries = data.draw(st.none() | st.slices(n).filter(lambda s: s.step is None or s.step > 0))
    options = {"mask": x.mask, "bias": x.bias, "scale": x.scale}
    with torch.no_grad():
        lse = attention(x.query, x.key, x.value, **options, return_lse=True).lse
        found = received(x.query, x.key, lse, **options, queries=queries)
        expected = weights(checked(x.query, x.key, x.value, **options))[:, :, queries or slice(None)].sum(2)
    assert_equal({"received": found}, {"received": expected}, EXACT)
