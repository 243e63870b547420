"""`regard.select` against loops written from its definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard import masks, select
from regard.errors import ArgumentError, ShapeError


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summary(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector for tokens (T, D), as the definition says."""
    if pooling == "max":
        return tokens.max(0).values
    return tokens.sum(0) / (len(tokens) if pooling == "mean" else math.sqrt(len(tokens)))


@pytest.mark.parametrize("pooling", ["mean", "max", "norm"])
@pytest.mark.parametrize(("n", "block_size"), [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_pool(pooling: str, n: int, block_size: int) -> None:
    x = randn(2, 3, n, 5)
    got = select.pool(x, block_size, pooling)
    assert got.shape == (2, 3, -(-n // block_size), 5)
    for i in range(got.shape[2]):
        want = summary(x[1, 2, i * block_size : (i + 1) * block_size], pooling)
        torch.testing.assert_close(got[1, 2, i], want)


@pytest.mark.parametrize("pooling", ["mean", "max", "norm"])
def test_pool_segments(pooling: str) -> None:
    x = randn(2, 9, 4)
    boundaries = torch.tensor([[0, 2, 3, 9], [0, 5, 9, 9]])
    got = select.pool_segments(x, boundaries, pooling)
    for b in range(2):
        for s in range(3):
            tokens = x[b, boundaries[b, s] : boundaries[b, s + 1]]
            want = summary(tokens, pooling) if len(tokens) else torch.zeros(4)
            torch.testing.assert_close(got[b, s], want)


def test_pool_keeps_half_precision_sums_exact() -> None:
    assert select.pool(torch.full((1, 4096, 1), 1 / 3, dtype=torch.float16), 4096).dtype == torch.float32


@pytest.mark.parametrize("boundaries", [[[0, 4]], [[1, 9]], [[0, 5, 4, 9]]])
def test_boundaries_that_do_not_cut_the_tokens(boundaries: list) -> None:
    with pytest.raises(ArgumentError, match="ascending positions from 0 to 9"):
        select.pool_segments(randn(1, 9, 4), torch.tensor(boundaries))


def test_boundaries_of_another_batch() -> None:
    with pytest.raises(ShapeError, match=r"\(2, S \+ 1\)"):
        select.pool_segments(randn(2, 9, 4), torch.tensor([[0, 9]]))


@pytest.mark.parametrize("shared", ["head", "group", "all"])
def test_block_scores(shared: str) -> None:
    q, k = randn(2, 4, 3, 5), randn(2, 2, 6, 5, seed=1)
    each = torch.einsum("bhnd,bhmd->bhnm", q, k.repeat_interleave(2, 1)) * 0.5
    want = {"head": each, "group": each.unflatten(1, (2, 2)).mean(2), "all": each.mean(1, keepdim=True)}[shared]
    torch.testing.assert_close(select.block_scores(q, k, shared, 0.5), want)


def test_rules() -> None:
    inf = math.inf
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0], [-inf, 5.0, -inf, -inf], [-inf, -inf, -inf, -inf]])
    assert select.top_k(scores, 2).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert select.top_k(scores, torch.tensor([1, 0, 4])).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # softmax of (0, 3, 1, 2) is (.03, .64, .09, .24): two hold 0.88, three 0.97
    assert select.top_p(scores, 0.88).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert select.top_p(scores, 0.89).int().tolist()[0] == [0, 1, 1, 1]
    assert not select.top_p(scores, 0.0).any()
    assert select.threshold(scores, 2.0).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert select.threshold(scores, -inf).int().tolist()[1] == [0, 1, 0, 0]


# --- choose ---------------------------------------------------------------------------------------------------------

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "past": st.integers(0, 30),
        "block_size": st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))),
        "pooling": st.sampled_from(["mean", "max", "norm"]),
        "shared": st.sampled_from(["head", "group", "all"]),
        "sinks": st.integers(0, 3),
        "local": st.integers(1, 3),
        "rule": st.one_of(
            st.fixed_dictionaries({"top_k": st.integers(1, 8)}),
            st.fixed_dictionaries({"top_p": st.floats(0, 1)}),
            st.fixed_dictionaries({"threshold": st.floats(-2, 2)}),
        ),
    }
)


def chosen(case: dict, q: torch.Tensor, k: torch.Tensor, **changes) -> torch.Tensor:
    arguments = {name: case[name] for name in ("block_size", "pooling", "shared", "sinks", "local")} | changes
    mask = select.choose(q, k, **arguments, **case["rule"])
    return mask.table.expand(q.shape[0], q.shape[1], -1, -1)  # type: ignore[attr-defined]


def inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(2, 4, case["n"], 6), randn(2, 2, case["past"] + case["n"], 6, seed=1)


def spans(case: dict) -> list[tuple[range, int]]:
    """For every query block: the key blocks it overlaps, and the position of its last query."""
    bq, bk = case["block_size"] if isinstance(case["block_size"], tuple) else (case["block_size"],) * 2
    found = []
    for start in range(0, case["n"], bq):
        first, last = case["past"] + start, case["past"] + min(start + bq, case["n"]) - 1
        found.append((range(first // bk, last // bk + 1), last))
    return found


@given(cases)
@settings(max_examples=150, deadline=None)
def test_choice_is_causal(case: dict) -> None:
    """What comes after a query block changes neither its choice nor what it may choose from."""
    q, k = inputs(case)
    table = chosen(case, q, k)
    for i, (own, last) in enumerate(spans(case)):
        assert not table[:, :, i, own.stop :].any()
        later_q, later_k = q.clone(), k.clone()
        later_q[:, :, last - case["past"] + 1 :] += 10
        later_k[:, :, last + 1 :] -= 10
        assert torch.equal(chosen(case, later_q, later_k)[:, :, i], table[:, :, i])


@given(cases)
@settings(max_examples=150, deadline=None)
def test_sinks_and_locals_are_kept_and_the_budget_holds(case: dict) -> None:
    table = chosen(case, *inputs(case))
    for i, (own, _) in enumerate(spans(case)):
        always = {*range(min(case["sinks"], own.stop)), *range(max(0, own.start - case["local"] + 1), own.stop)}
        assert table[:, :, i, sorted(always)].all()
        if "top_k" in case["rule"]:
            budget = min(max(case["rule"]["top_k"], len(always)), own.stop)
            assert (table[:, :, i].sum(-1) == budget).all()


@pytest.mark.parametrize("pooling", ["mean", "norm"])
def test_top_k_is_what_a_loop_finds(pooling: str) -> None:
    n, bs, k_blocks = 53, 8, 4
    q, k = randn(1, 2, n, 6), randn(1, 1, n, 6, seed=1)
    mask = select.choose(q, k, top_k=k_blocks, block_size=bs, pooling=pooling, sinks=1, local=2)
    for h in range(2):
        for i in range(-(-n // bs)):
            own = summary(q[0, h, i * bs : (i + 1) * bs], pooling)
            always = {0, max(0, i - 1), i}
            scores = {
                j: float(own @ summary(k[0, 0, j * bs : (j + 1) * bs], pooling)) for j in range(i) if j not in always
            }
            best = sorted(scores, key=lambda j: -scores[j])[: k_blocks - len(always)]
            assert mask.table[0, h, i].nonzero().flatten().tolist() == sorted(always | set(best))


def test_not_causal_chooses_on_both_sides() -> None:
    q, k = randn(1, 1, 64, 8), randn(1, 1, 96, 8, seed=1)
    table = select.choose(q, k, top_k=3, block_size=8, sinks=0, local=0, causal=False).table[0, 0]
    assert (table.sum(-1) == 3).all()
    scores = select.pool(q, 8) @ select.pool(k, 8).mT
    assert torch.equal(table, select.top_k(scores[0, 0], 3))


@pytest.mark.parametrize("offset", [0, 5, 40])
def test_decoding_chooses_as_the_prompt_did(offset: int) -> None:
    """A block of queries chooses the same whether it comes alone, after its past, or in one long prompt."""
    n, bs = 48, 8
    q, k = randn(1, 2, n, 4), randn(1, 2, n, 4, seed=1)
    whole = select.choose(q, k, top_k=3, block_size=bs).table
    start = offset // bs * bs
    part = select.choose(q[:, :, start : start + bs], k[:, :, : start + bs], top_k=3, block_size=bs).table
    assert torch.equal(part[:, :, 0], whole[:, :, start // bs, : start // bs + 1])


def test_feeds_attention() -> None:
    q, k, v = randn(2, 4, 50, 8), randn(2, 2, 70, 8, seed=1), randn(2, 2, 70, 8, seed=2)
    mask = select.choose(q, k, top_k=3, block_size=8, shared="group") & masks.causal().shift(20)
    out = regard.attention(q, k, v, mask=mask)
    scores = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(~mask.dense(50, 70), -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(2, 1))
    everything = select.choose(q, k, top_k=9, block_size=8) & masks.causal().shift(20)
    torch.testing.assert_close(
        regard.attention(q, k, v, mask=everything), regard.attention(q, k, v, mask=masks.causal().shift(20))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "exactly one of top_k, top_p and threshold, got none"),
        ({"top_k": 2, "top_p": 0.5}, "got top_k and top_p"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 1.5}, "top_p: expected a share from 0 to 1, got 1.5"),
        ({"top_k": 2, "sinks": -1}, "sinks: expected at least 0"),
        ({"top_k": 2, "local": 0}, "local: expected at least 1, got 0"),
        ({"top_k": 2, "offset": 5}, "offset: expected 0 to 4"),
        ({"top_k": 2, "block_size": 0}, "block_size"),
        ({"top_k": 2, "pooling": "median"}, "pooling: expected one of mean, max, norm, got 'median'"),
        ({"top_k": 2, "shared": "layer"}, "shared: expected one of head, group, all, got 'layer'"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        select.choose(randn(1, 2, 8, 4), randn(1, 1, 12, 4), **changes)


def test_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ShapeError, match="heads"):
        select.choose(randn(1, 3, 8, 4), randn(1, 2, 8, 4), top_k=2)
