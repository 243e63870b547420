"""`attention` as a whole: what it refuses, what it chooses, and its edges."""

import pytest
import torch

import regard
from regard import masks
from regard.attention import Explanation, Partial, attention, explain, merge, received
from regard.errors import ArgumentError, ShapeError, Unsupported
from tests.attention.inputs import assert_equal, everything, make

q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)


def test_the_package_is_the_operator() -> None:
    assert torch.equal(regard.attention(q, k, v), attention(q, k, v))
    assert regard.attention.explain(q, k, v).backend == "sdpa"
    assert regard.merge is merge


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": q[0]}, "query: expected four dimensions"),
        ({"key": k[..., :7]}, r"key: expected shape \(2, Hk, M, 8\)"),
        ({"key": k[:1], "value": v[:1]}, r"key: expected shape \(2, Hk, M, 8\)"),
        ({"value": v[:, :, :8]}, r"value: expected shape \(2, 2, 9, Dv\)"),
        ({"query": q[:, :3]}, "2 heads do not divide the 3 heads"),
        ({"mask": torch.ones(6, 8, dtype=torch.bool)}, r"mask: shape \(6, 8\) does not broadcast"),
        ({"mask": torch.ones(1, 2, 4, 6, 9, dtype=torch.bool)}, "mask: shape"),
        ({"bias": torch.zeros(3, 6, 9)}, "bias: shape"),
        ({"mask": masks.from_dense(torch.ones(6, 10, dtype=torch.bool))}, "10"),
        ({"mask": masks.per_head([masks.causal()] * 3)}, "mask: distinguishes 3 heads, query has 4"),
        ({"mask": masks.from_dense(torch.ones(3, 1, 6, 9, dtype=torch.bool))}, "distinguishes 3 batch items"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    arguments = {"query": q, "key": k, "value": v} | change
    with pytest.raises(ShapeError, match=message):
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": [1.0]}, "query: expected a tensor, got list"),
        ({"query": q.long()}, "query: expected a floating point tensor"),
        ({"key": k.double()}, "key: expected torch.float32 on cpu like query, got torch.float64"),
        ({"mask": torch.zeros(6, 9)}, "additive terms go in bias"),
        ({"mask": "causal"}, "mask: expected a regard mask"),
        ({"bias": torch.ones(6, 9, dtype=torch.bool)}, "bias: expected a floating point tensor"),
        ({"backend": "fast"}, "backend: expected one of auto, reference"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    arguments = {"query": q, "key": k, "value": v} | change
    with pytest.raises(ArgumentError, match=message):
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


def test_merge_and_received_refuse_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match="at least one Partial"):
        merge()
    with pytest.raises(ShapeError, match="partial 1"):
        merge(Partial.empty(1, 2, 3, 4), Partial.empty(1, 2, 5, 4))
    with pytest.raises(ShapeError, match="lse: expected shape"):
        received(q, k, torch.zeros(2, 4, 5))


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "blocks"])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(backend: str, n: int, m: int) -> None:
    x = make(1, 2, 1, n, m, 4, 3, masks.causal())
    found = everything(x, backend)
    assert found["out"].shape == (1, 2, n, 3)
    assert (found["lse"] == -torch.inf).all()
    assert not any(t.isnan().any() or t.any() for name, t in found.items() if name != "lse")


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "blocks"])
def test_a_query_that_sees_nothing_has_zeros_everywhere(backend: str) -> None:
    mask = torch.ones(300, 200, dtype=torch.bool)
    mask[17], mask[64:192] = False, False
    found = everything(make(1, 2, 2, 300, 200, 4, 4, masks.from_dense(mask)), backend)
    unseen = ~mask.any(-1)
    assert (found["lse"][..., unseen] == -torch.inf).all()
    for name in ("out", "grad query"):
        assert (found[name][..., unseen, :] == 0).all()
        assert found[name].isfinite().all()


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.causal().shift(70), masks.causal().shift(-3)])
@pytest.mark.parametrize(("n", "m"), [(300, 300), (230, 300), (300, 230), (1, 71)])
def test_sdpa_recognises_full_and_causal(mask: masks.Mask | None, n: int, m: int) -> None:
    x = make(2, 4, 2, n, m, 8, 8, mask)
    assert_equal(everything(x, "sdpa"), everything(x, "reference"), 1e-10)


def test_sdpa_builds_no_mask_for_full_and_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.attention.sdpa._additive", None)
    for n, m, mask in [
        (6, 9, None),
        (6, 9, masks.full()),
        (9, 9, masks.causal()),
        (6, 9, masks.causal().shift(3)),
        (1, 9, masks.causal().shift(8)),
        (1, 9, (masks.causal() & (masks.sliding_window(20) | masks.sinks(2))).shift(8)),
    ]:
        attention(torch.randn(1, 2, n, 4), torch.randn(1, 2, m, 4), torch.randn(1, 2, m, 4), mask=mask, backend="sdpa")


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_lse_in_float32(backend: str, dtype: torch.dtype) -> None:
    x = make(1, 2, 1, 150, 150, 16, 16, masks.sliding_window(40))
    found, expected = everything(x.to(dtype), backend), everything(x, "reference")
    assert found["lse"].dtype == torch.float32
    assert_equal(found, expected, 0.03)


@pytest.mark.parametrize("mask", [masks.sliding_window(3) & masks.causal().shift(2), masks.full()])
def test_blocks_pass_gradcheck(mask: masks.Mask) -> None:
    x = make(1, 4, 2, 7, 9, 3, 2, mask, bias=(4, 1, 9))

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> tuple:
        return attention(query, key, value, mask=mask, bias=bias, backend="blocks", return_lse=True)

    assert torch.autograd.gradcheck(run, (x.query, x.key, x.value, x.bias))


def test_strided_and_offset_inputs() -> None:
    """Slices of one projection, heads behind tokens: the layouts models hand over."""
    qkv = torch.randn(2, 200, 3, 4, 8, dtype=torch.float64)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mask = masks.sliding_window(30)
    expected = attention(query, key, value, mask=mask, backend="reference", return_lse=True)
    for backend in ("sdpa", "blocks"):
        found = attention(query, key, value, mask=mask, backend=backend, return_lse=True)
        assert_equal(found._asdict(), expected._asdict(), 1e-10)


def test_the_choice_is_explained() -> None:
    long = torch.randn(1, 2, 2048, 16)
    window = explain(long, long, long, mask=masks.sliding_window(64))
    assert window.backend == "blocks"
    assert window.density < 0.15
    assert window.block_size is not None
    assert "of the pairs" in str(window)
    assert explain(long, long, long, mask=masks.causal()).density == pytest.approx(0.5, abs=0.01)
    assert explain(long, long, long, mask=torch.ones(2048, 2048, dtype=torch.bool)).backend == "sdpa"
    assert explain(long, long, long, mask=masks.causal(), return_lse=True).backend == "sdpa"
    learnt = torch.zeros(2048, 2048, requires_grad=True)
    assert explain(long, long, long, bias=learnt).backend == "blocks"
    assert explain(long[:, :, :0], long, long) == Explanation("reference", "there is nothing to compute", 0.0)


def test_sdpa_refuses_an_lse_it_cannot_differentiate() -> None:
    bias = torch.zeros(6, 9, requires_grad=True)
    with pytest.raises(Unsupported, match="use backend='blocks'"):
        attention(q, k, v, bias=bias, backend="sdpa", return_lse=True)


def test_blocks_make_nothing_of_size_n_by_m() -> None:
    """A million pairs would be 4 MB, the largest tensor here has a fraction of that."""
    n, sizes = 8192, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                if isinstance(t, torch.Tensor):
                    sizes.append(t.untyped_storage().nbytes())
            return result

    x = torch.randn(1, 1, n, 8, requires_grad=True)
    bias = torch.zeros(n, requires_grad=True)
    with Watch():
        attention(x, x, x, mask=masks.sliding_window(30), bias=bias, backend="blocks").sum().backward()
    assert max(sizes) < n * n  # bytes: a quarter of the smallest dtype the scores could have
