"""The three forms of linear attention against the double sum, with every kind of decay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.linear import elu1, linear_attention, normalized_linear_attention, taylor

FORMS = ("chunked", "recurrent", "parallel")
DECAYS = ("none", "head", "token", "channel")


def problem(n: int, kind: str, batch: int = 2, heads: int = 2, seed: int = 0, strong: float = 1.0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = randn(batch, heads, n, 3), randn(batch, heads, n, 3), randn(batch, heads, n, 4)
    shape = {"head": (heads,), "token": (batch, heads, n), "channel": (batch, heads, n, 3)}.get(kind)
    decay = None if shape is None else -strong * randn(*shape).abs()
    return q, k, v, decay, randn(batch, heads, 3, 4)


def double_sum(q, k, v, decay, state):
    batch, heads, n, _ = q.shape
    g = torch.zeros_like(q)
    if decay is not None:
        g = (
            decay[None, :, None, None]
            if decay.dim() == 1
            else decay.unflatten(-1, (-1, 1))
            if decay.dim() == 3
            else decay
        ).expand_as(q)
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=q.dtype)
    for i in range(n):
        for j in range(i + 1):
            weight = (q[:, :, i] * k[:, :, j] * g[:, :, j + 1 : i + 1].sum(2).exp()).sum(-1)
            out[:, :, i] += weight[..., None] * v[:, :, j]
        faded = state * g[:, :, : i + 1].sum(2).exp()[..., None]
        out[:, :, i] += (q[:, :, i, None, :] @ faded).squeeze(-2)
    after = state * g.sum(2).exp()[..., None]
    for j in range(n):
        after = after + (k[:, :, j] * g[:, :, j + 1 :].sum(2).exp())[..., None] * v[:, :, j, None]
    return out, after


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 20),
    chunk_size=st.integers(1, 9),
    kind=st.sampled_from(DECAYS),
    form=st.sampled_from(FORMS),
    strong=st.sampled_from([0.1, 1.0, 300.0]),
)
def test_all_forms_are_the_double_sum(n: int, chunk_size: int, kind: str, form: str, strong: float) -> None:
    q, k, v, decay, state = problem(n, kind, strong=strong)
    got = linear_attention(q, k, v, decay=decay, state=state, form=form, chunk_size=chunk_size)
    out, after = double_sum(q, k, v, decay, state)
    torch.testing.assert_close(got.out, out)
    torch.testing.assert_close(got.state, after)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, kind: str) -> None:
    q, k, v, decay, state = problem(5, kind, batch=1)
    tensors = [t.requires_grad_() for t in (q, k, v, state, *([] if decay is None else [decay]))]

    def call(q, k, v, state, decay=None):
        return linear_attention(q, k, v, state=state, decay=decay, form=form, chunk_size=2)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("kind", DECAYS)
def test_segments_that_are_computed_again_give_the_same_gradients(kind: str) -> None:
    """Long enough that the backward recomputes chunks from a kept state."""
    q, k, v, decay, state = problem(70, kind, batch=1)
    tensors = [t.requires_grad_() for t in (q, k, v, state, *([] if decay is None else [decay]))]
    results = []
    for form, chunk_size in (("chunked", 2), ("parallel", 2)):
        out, after = linear_attention(q, k, v, decay=decay, state=state, form=form, chunk_size=chunk_size)
        results.append(torch.autograd.grad(out.square().sum() + after.sum(), tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", DECAYS)
def test_the_state_hands_over(kind: str) -> None:
    q, k, v, decay, _ = problem(23, kind)
    want = linear_attention(q, k, v, decay=decay)
    state, out, start = None, [], 0
    for length in (9, 1, 13):
        part = slice(start, start + length)
        g = decay if decay is None or decay.dim() == 1 else decay[:, :, part]
        o, state = linear_attention(q[:, :, part], k[:, :, part], v[:, :, part], decay=g, state=state)
        out.append(o)
        start += length
    torch.testing.assert_close(torch.cat(out, 2), want.out)
    torch.testing.assert_close(state, want.state)


def test_without_causality_every_query_sees_all_keys() -> None:
    q, k, v, _, _ = problem(6, "none")
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    got = linear_attention(q[:, :, :4], k, v, causal=False, valid=valid).out
    weights = (q[:, :, :4] @ k.mT) * valid[:, None, None]
    torch.testing.assert_close(got, weights @ v)


@pytest.mark.parametrize("causal", [True, False])
def test_normalised_is_a_weighted_mean(causal: bool) -> None:
    q, k, v, _, _ = problem(9, "none")
    q, k = elu1(q), elu1(k)
    weights = q @ k.mT
    weights = weights.tril() if causal else weights
    want = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(normalized_linear_attention(q, k, v, causal=causal, eps=0.0).out, want)
    clamped = weights / weights.sum(-1, keepdim=True).clamp(min=30.0) @ v
    got = normalized_linear_attention(q, k, v, causal=causal, min_denominator=30.0).out
    torch.testing.assert_close(got, clamped)


def test_grouped_heads_and_padding() -> None:
    q, k, v, _, _ = problem(8, "none", heads=4)
    k, v = k[:, :2], v[:, :2]
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 3:5] = False
    got = linear_attention(q, k, v, valid=valid).out
    weights = (q @ k.repeat_interleave(2, 1).mT).tril() * valid[:, None, None]
    torch.testing.assert_close(got, weights @ v.repeat_interleave(2, 1))


def test_half_precision_sums_in_float32() -> None:
    q, k, v, decay, _ = (None if t is None else t.float() for t in problem(300, "token", strong=0.01))
    want = linear_attention(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), decay=decay)
    got = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay=decay)
    assert got.out.dtype == torch.bfloat16
    assert got.state.dtype == torch.float32
    torch.testing.assert_close(got.out, want.out.bfloat16())


def test_it_compiles_in_one_graph() -> None:
    q, k, v, decay, _ = (None if t is None else t.float() for t in problem(40, "head"))
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, decay=decay).out, linear_attention(q, k, v, decay=decay).out)


def test_taylor_features() -> None:
    q, k = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    s = (q * k).sum(-1)
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s.square() / 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"form": "fast"}, ArgumentError, "form: expected one of"),
        ({"chunk_size": 0}, ArgumentError, "chunk_size"),
        ({"decay": torch.zeros(3)}, ShapeError, "decay: expected"),
        ({"state": torch.zeros(2, 2, 4, 3)}, ShapeError, "state: expected"),
        ({"valid": torch.ones(2, 5)}, ShapeError, "valid: expected bool"),
        ({"decay": torch.zeros(2), "causal": False}, Unsupported, "without causality"),
    ],
)
def test_bad_arguments(change, error, message) -> None:
    q, k, v, _, _ = problem(6, "none")
    with pytest.raises(error, match=message):
        linear_attention(q, k, v, **change)


def test_bad_shapes() -> None:
    q, k, v, _, _ = problem(6, "none")
    with pytest.raises(ShapeError, match="as many keys as queries"):
        linear_attention(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ShapeError, match="v: expected"):
        linear_attention(q, k, v[:, :1])
