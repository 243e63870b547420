"""Preplan and anchor: the paper's formulas in loops, cases by hand, and models."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError, ShapeError
from regard.probes import attention_span, fai, record_rhythm, rhythm_credit, split_heads, token_entropy, waad
from regard.probes.rhythm import rhythm_of_maps, sampled_layers, variation
from tests.tiny_models import tiny

N = 30
CLOSE = {"atol": 1e-10, "rtol": 0}


def maps(seed, layers=2, heads=5, n=N):
    """Random causal weights in float64, sharp enough that heads differ."""
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(layers, heads, n, n, dtype=torch.float64, generator=generator)
    return scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)


def loops(attn, response, frac, window, h_lo, h_hi):
    """Steps 1 to 5 of the paper."""
    layers, heads, n, _ = attn.shape
    a = attn.tolist()
    span = {
        (layer, h): sum(a[layer][h][t][s] * (t - s) for t in response for s in range(t + 1)) / len(response)
        for layer in range(layers)
        for h in range(heads)
    }
    order = sorted(span, key=lambda at: (span[at], at))
    count = max(1, math.floor(frac * len(order) + 1e-9))

    def mean(chosen, t, s):
        return sum(a[layer][h][t][s] for layer, h in chosen) / len(chosen)

    local, distant = order[:count], order[-count:]
    distances = [sum(mean(local, t, s) * min(t - s, window) for s in range(t + 1)) for t in response]
    influence = []
    for s in response:
        later = [t for t in response if s + h_lo <= t <= min(n, s + h_hi)]
        influence.append(sum(mean(distant, t, s) for t in later) / len(later) if later else 0.0)
    return span, local, distant, distances, influence


def credit_loops(w, f, mode, q, amp, alpha, k, tau_waad, tau_delta):
    """Steps 6 and 7, on lists."""
    n = len(w)
    delta = [abs(w[t] - w[t + 1]) for t in range(n - 1)] + [0.0]

    def top(values):
        count = max(1, math.floor(q * n + 1e-9))
        return set(sorted(range(n), key=lambda t: (-values[t], t))[:count])

    local, anchors = top(delta), {t for t in top(f) if f[t] > 0}
    if mode == "local":
        return [1 + (amp - 1) * (t in local) for t in range(n)]
    if mode == "global":
        return [1 + (amp - 1) * (t in anchors) for t in range(n)]
    tau_waad = statistics.median(w) if tau_waad is None else tau_waad
    tau_delta = min(delta[t] for t in local) if tau_delta is None else tau_delta
    dominated, introduced = set(), set()
    for t in anchors:
        window = list(range(max(0, t - k), t))
        if w[t] <= tau_waad and window and max(delta[u] for u in window) >= tau_delta:
            dominated.add(t)
            introduced.add(max(window, key=lambda u: (delta[u], -u)))
    return [
        1
        + (amp - 1) * (t in anchors - dominated)
        + (1 - alpha) * (amp - 1) * (t in dominated)
        + alpha * (amp - 1) * (t in introduced)
        for t in range(n)
    ]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    response=st.sets(st.integers(0, N - 1), min_size=1),
    frac=st.sampled_from([0.1, 0.3, 0.5]),
    window=st.integers(1, 12),
    h_lo=st.integers(0, 12),
    more=st.integers(0, 20),
)
def test_metrics_are_the_formulas(seed, response, frac, window, h_lo, more) -> None:
    attn, mask = maps(seed), torch.tensor([t in response for t in range(N)])
    found = rhythm_of_maps(attn, mask, frac=frac, window_size=window, h_lo=h_lo, h_hi=h_lo + more)
    span, local, distant, distances, influence = loops(attn, sorted(response), frac, window, h_lo, h_lo + more)
    torch.testing.assert_close(found.span.flatten().tolist(), list(span.values()), **CLOSE)
    assert {tuple(at) for at in found.local_heads.nonzero().tolist()} == set(local)
    assert {tuple(at) for at in found.global_heads.nonzero().tolist()} == set(distant)
    torch.testing.assert_close(found.waad.tolist(), distances, **CLOSE)
    torch.testing.assert_close(found.fai.tolist(), influence, **CLOSE)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    ties=st.booleans(),
    mode=st.sampled_from(["local", "global", "coupled"]),
    q=st.sampled_from([0.01, 0.2, 0.4, 1.0]),
    amp=st.floats(0.5, 3),
    alpha=st.floats(0, 1),
    k=st.integers(1, 4),
    tau_waad=st.none() | st.floats(0, 1),
    tau_delta=st.none() | st.floats(0, 1),
)
def test_credit_is_the_formula(seed, n, ties, mode, q, amp, alpha, k, tau_waad, tau_delta) -> None:
    w, f = torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if ties:
        w, f = (4 * w).round() / 4, (4 * f).round() / 4
    got = rhythm_credit(w, f, mode, q, amp, alpha, k, tau_waad, tau_delta)
    want = credit_loops(w.tolist(), f.tolist(), mode, q, amp, alpha, k, tau_waad, tau_delta)
    torch.testing.assert_close(got.tolist(), want, **CLOSE)


def test_by_hand() -> None:
    response = torch.arange(N) >= 5
    diagonal = torch.eye(N, dtype=torch.float64)
    assert not waad(diagonal, response).any()
    assert not attention_span(diagonal[None, None], response).any()
    uniform = torch.ones(N, N, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    expected = [statistics.fmean(min(t - s, 10) for s in range(t + 1)) for t in range(5, N)]
    torch.testing.assert_close(waad(uniform, response).tolist(), expected, **CLOSE)
    anchored = 0.75 * diagonal
    anchored[:, 7] += 0.25
    influence = fai(anchored, response)
    assert influence[7 - 5] == 0.25
    assert not influence[[i for i in range(N - 5) if i != 2]].any()
    # a jump before an anchor: tokens 2 (jump) and 3 (anchor)
    gamma = rhythm_credit(torch.tensor([1.0, 1, 5, 1, 1]), torch.tensor([0.1, 0, 0, 0.9, 0]), q=0.2, alpha=0.25)
    assert gamma.tolist() == [1, 1.125, 1, 1.375, 1]  # Δ = (0, 4, 4, 0, 0): of equal ones the earlier


@pytest.mark.parametrize("mode", ["local", "global"])
@pytest.mark.parametrize("n", [5, 50, 115])
def test_mean_credit(mode, n) -> None:
    w, f = torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rhythm_credit(w, f, mode).mean().item() == pytest.approx(1.2, abs=1e-12)


def test_alpha_moves_credit_from_anchors_to_what_introduces_them() -> None:
    w, f = torch.rand(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    none, all_ = (rhythm_credit(w, f, alpha=alpha, k=1) for alpha in (0.0, 1.0))
    assert torch.equal(none, rhythm_credit(w, f, "global"))
    assert all_.sum() == none.sum()  # with k = 1 no token introduces two
    assert not torch.equal(all_, none)


def test_of_equal_spans_the_first_is_local() -> None:
    local, distant = split_heads(torch.ones(2, 3), 0.34)
    assert local.tolist() == [[True, True, False], [False, False, False]]
    assert distant.tolist() == [[False, False, False], [False, True, True]]


def test_layers_lie_in_the_middle_third() -> None:
    assert sampled_layers(36) == [12, 15, 18, 21, 24]
    assert sampled_layers(30) == [10, 12, 15, 18, 20]
    assert sampled_layers(3) == [1, 2]


def test_of_a_model_with_padding_and_gradients_off() -> None:
    model = tiny("llama", attn_implementation="eager")
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[1, :6] = 0
    response = torch.zeros(2, 40, dtype=torch.bool)
    response[0, 12:36], response[1, 20:] = True, True  # the first ends early
    found = record_rhythm(model, {"input_ids": ids, "attention_mask": padding}, response)
    with torch.no_grad():
        for item, first in ((0, 0), (1, 6)):
            maps = model(ids[item : item + 1, first:], output_attentions=True).attentions
            alone = rhythm_of_maps(torch.cat([maps[1], maps[2]]), response[item, first:])
            for name in ("waad", "fai", "span"):
                torch.testing.assert_close(getattr(found[item], name), getattr(alone, name), atol=1e-5, rtol=1e-4)
    assert found[0].layers == (1, 2)
    assert torch.equal(found[0].variation, variation(found[0].waad))
    assert torch.equal(found[0].credit("local"), rhythm_credit(found[0].waad, found[0].fai, "local"))
    assert [len(each.fai) for each in found] == [24, 20]


def test_entropy() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(token_entropy(logits), torch.tensor([1.5 * math.log(2), 0.0]))


def test_refusals() -> None:
    attn, mask, values = maps(0), torch.ones(N, dtype=torch.bool), torch.rand(9)
    with pytest.raises(ShapeError, match="expected weights"):
        attention_span(attn, mask[1:])
    with pytest.raises(ArgumentError, match="response_mask: expected some tokens"):
        waad(attn[0, 0], ~mask)
    with pytest.raises(ArgumentError, match="window_size must be at least 1"):
        waad(attn[0, 0], mask, 0)
    with pytest.raises(ArgumentError, match="h_lo, h_hi"):
        fai(attn[0, 0], mask, 5, 4)
    with pytest.raises(ArgumentError, match=r"frac must be above 0 and at most 0\.5"):
        split_heads(torch.rand(2, 2), 0.6)
    with pytest.raises(ShapeError, match="two heads at least"):
        split_heads(torch.rand(1, 1))
    with pytest.raises(ArgumentError, match="mode must be one of local, global, coupled, got 'both'"):
        rhythm_credit(values, values, "both")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="waad, fai"):
        rhythm_credit(values, values[1:])
    for wrong in ({"q": 0.0}, {"alpha": 2.0}, {"k": 0}):
        with pytest.raises(ArgumentError, match="expected 0 < q <= 1"):
            rhythm_credit(values, values, **wrong)
    with pytest.raises(ShapeError, match="response_mask: expected"):
        record_rhythm(tiny("llama"), torch.ones(1, 5, dtype=torch.long), mask)
    with pytest.raises(ArgumentError, match="num_layers, count"):
        sampled_layers(0)
