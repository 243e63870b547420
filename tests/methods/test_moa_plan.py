"""MoA's influence, space of rules, solver and plans, each against what the paper's equations say, written out."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard import masks
from regard.errors import ArgumentError, ShapeError
from regard.methods.language.moa import (
    ElasticSpace,
    MoAPlan,
    Spans,
    attention_influence,
    best_plan,
    optimise_plan,
    per_kv_head,
    search_plans,
    span_mask,
)


def tensors(b=2, h=4, hk=2, n=12, d=5, dv=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((b, h, n, d), (b, hk, n, d), (b, hk, n, dv), (b, h, n, dv))
    ]


def naive_influence(q, k, v, grad, causal):
    """|E| entry by entry."""
    b, h, n, d = q.shape
    found = torch.zeros(b, h, n, n, dtype=q.dtype)
    for item, head, i in itertools.product(range(b), range(h), range(n)):
        shared = head // (h // k.shape[1])
        keys = range(i + 1) if causal else range(n)
        scores = [float(q[item, head, i] @ k[item, shared, j]) / math.sqrt(d) for j in keys]
        total = sum(map(math.exp, scores))
        weights = [math.exp(s) / total for s in scores]
        slopes = [float(grad[item, head, i] @ v[item, shared, j]) for j in keys]
        mean = sum(a * s for a, s in zip(weights, slopes, strict=True))
        for j, (a, s) in enumerate(zip(weights, slopes, strict=True)):
            alone = causal and i == 0
            found[item, head, i, j] = abs(a * s if alone else a * (s - mean) / (1 - a))
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_influence_is_the_formula(causal, monkeypatch):
    given_ = tensors()
    want = naive_influence(*given_, causal)
    got = attention_influence(*given_, causal=causal, block_size=1)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
    monkeypatch.setattr("regard.methods.language.moa.influence._CHUNK_WEIGHTS", 2 * 4 * 12 * 4)  # a row of blocks
    pooled = want.unflatten(3, (3, 4)).sum(4).unflatten(2, (3, 4)).sum(3)
    torch.testing.assert_close(attention_influence(*given_, causal=causal, block_size=4), pooled, atol=1e-9, rtol=1e-8)


def test_influence_is_what_removing_an_entry_costs():
    """A loss that is no linear function: first order, within 5 % where little is removed."""
    q, k, v, _ = (x[:1, :1] for x in tensors(h=1, hk=1, n=16, seed=3))
    readout = 0.1 * torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(out):
        return (out @ readout).tanh().exp().sum()

    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    weights = (q @ k.mT / math.sqrt(5)).masked_fill(~allowed, -torch.inf).softmax(-1)
    out = (weights @ v).requires_grad_()
    (grad,) = torch.autograd.grad(loss(out), out)
    effect = attention_influence(q, k, v, grad, block_size=1)[0, 0]
    checked = 0
    for i, j in itertools.product(range(2, 16), range(16)):
        if j > i or not 1e-4 < weights[0, 0, i, j] < 0.02:
            continue
        changed = weights.clone()
        changed[0, 0, i, j] = 0
        changed[0, 0, i] /= changed[0, 0, i].sum()
        true = abs(float((loss(changed @ v) - loss(out)).detach()))
        if true > 1e-3:
            assert abs(effect[i, j].item() - true) < 0.05 * true
            checked += 1
    assert checked > 10


def test_influence_refuses():
    q, k, v, grad = tensors()
    for arguments, options, error, message in (
        ((q, k, v, grad[..., :2]), {}, ShapeError, "grad_out"),
        ((q, k, v, grad), {"block_size": 5}, ShapeError, "multiple of block_size=5"),
        ((q, k, v, grad), {"block_size": 0}, ArgumentError, "block_size must be at least 1"),
        ((q[:, :, :4], k, v, grad[:, :, :4]), {"block_size": 2}, ShapeError, "as many keys as queries"),
    ):
        with pytest.raises(error, match=message):
            attention_influence(*arguments, **options)


# --- the space of rules ---------------------------------------------------------------------------------------------

SPACE = ElasticSpace.grid(
    [-32, 0, 32, 64], [0, 0.25, 0.5, 1], min_length=32, max_profile=64, max_length=128, block_size=4
)


def kept(alpha, beta, length, b):
    size = length // b
    band = int(alpha // b + beta * size)
    return [[j == 0 or i - max(band, 1) < j <= i for j in range(size)] for i in range(size)]


def test_rules_are_those_that_make_sense_in_order():
    pairs = list(zip(SPACE.alphas, SPACE.betas, strict=True))
    want = [
        (a, b)
        for a, b in itertools.product([-32, 0, 32, 64], [0, 0.25, 0.5, 1])
        if a + b * 64 <= 64 and a + b * 128 <= 128 and a + b * 32 > 0
    ]
    assert sorted(pairs) == sorted(want)
    spans = [a + b * 128 for a, b in pairs]
    assert spans == sorted(spans)
    default = ElasticSpace.default([2048, 4096], [8192])
    assert set(default.betas) <= {i / 8 for i in range(9)}
    assert set(default.alphas) <= set(torch.linspace(-2048, 4096, 7).tolist())


@pytest.mark.parametrize("length", [32, 64, 128])
def test_layout_loss_and_cost_are_the_definition(length):
    size = length // 4
    importance = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses, costs, layouts = SPACE.loss(importance), SPACE.cost(length), SPACE.layouts(length)
    for c, (alpha, beta) in enumerate(zip(SPACE.alphas, SPACE.betas, strict=True)):
        blocks = kept(alpha, beta, length, 4)
        assert layouts[c].tolist() == blocks
        assert costs[c] == pytest.approx(max(map(sum, blocks)) / size * length)
        for l, h in itertools.product(range(2), range(3)):
            lost = sum(float(importance[l, h, i, j]) for i in range(size) for j in range(i + 1) if not blocks[i][j])
            assert losses[l, h, c].item() == pytest.approx(lost, abs=1e-9)


def test_space_refuses():
    with pytest.raises(ArgumentError, match="equally many"):
        ElasticSpace((1.0,), (), 4)
    with pytest.raises(ArgumentError, match="none of 1 pairs"):
        ElasticSpace.grid([-64], [0.5], min_length=32, max_profile=64, max_length=64)
    with pytest.raises(ArgumentError, match="at least one length"):
        ElasticSpace.default([])
    with pytest.raises(ShapeError, match="importance"):
        SPACE.loss(torch.zeros(3, 4))
    with pytest.raises(ArgumentError, match="at least one block"):
        SPACE.cost(3)


# --- the solver -----------------------------------------------------------------------------------------------------


def problem(seed, heads=4, rules=5):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.arange(1, rules + 1).double() * torch.tensor([[1.0], [2.0]]).double()
    losses = torch.rand(2, heads, rules, generator=generator).double().sort(-1, descending=True).values
    return losses, costs, [2.5 * heads, 5.5 * heads]


def feasible(losses, costs, bounds, lower, per_layer, most):
    """All choices within the bounds, with their losses."""
    found = {}
    heads, rules = losses.shape[1:]
    for choice in itertools.product(range(rules), repeat=heads):
        spent = [sum(float(c[r]) for r in choice) for c in costs]
        layers = [choice[i : i + per_layer] for i in range(0, heads, per_layer)]
        if all(lower * b <= s <= b for s, b in zip(spent, bounds, strict=True)) and all(
            len(set(layer)) <= most for layer in layers
        ):
            found[choice] = [sum(float(z[h, r]) for h, r in enumerate(choice)) for z in losses]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 2])
def test_solutions_are_on_the_pareto_front_of_all_choices(seed, most):
    losses, costs, bounds = problem(seed)
    steps = []
    found = optimise_plan(
        losses, costs, bounds, heads_per_layer=2, max_rules_per_layer=most, gap=0,
        on_progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    everything = feasible(losses, costs, bounds, 0.9, 2, most)
    assert found
    for solution in found:
        own = everything[tuple(solution.rules.tolist())]  # within bounds and limits, else a KeyError
        torch.testing.assert_close(solution.losses, torch.tensor(own).double())
        assert not any(all(a <= b - 1e-9 for a, b in zip(other, own, strict=True)) for other in everything.values())
    for p in range(2):  # each length's own optimum is reached
        assert min(s.losses[p].item() for s in found) == pytest.approx(min(v[p] for v in everything.values()))
    assert steps == [(i, 10) for i in range(1, 11)]


def test_one_length_is_the_brute_force_optimum():
    losses, costs, bounds = problem(7)
    total = losses.sum(0, keepdim=True)
    (found,) = optimise_plan(total, costs, bounds, max_rules_per_layer=None, lower_ratio=None, gap=0)
    best = best_plan(losses, costs, bounds)
    assert found.losses.item() == pytest.approx(best.losses.sum().item())
    everything = feasible(losses, costs, bounds, 0, 1, 1)
    assert best.losses.sum().item() == pytest.approx(min(map(sum, everything.values())))
    assert (best.costs <= torch.tensor(bounds)).all()


def test_ties_go_to_the_lowest_indices():
    assert best_plan(torch.zeros(1, 3, 4), torch.ones(1, 4), [3.0]).rules.tolist() == [0, 0, 0]


def test_solver_refuses():
    losses, costs, bounds = problem(0)
    with pytest.raises(ArgumentError, match="no choice of rules costs"):
        optimise_plan(losses, costs, [1.0, 1.0])
    with pytest.raises(ArgumentError, match="no choice of rules costs"):
        best_plan(losses, costs, [1.0, 1.0])
    with pytest.raises(ArgumentError, match="too many to try"):
        best_plan(torch.zeros(1, 20, 5), torch.zeros(1, 5), [1.0])
    with pytest.raises(ShapeError, match="costs"):
        optimise_plan(losses, costs[:, :2], bounds)
    with pytest.raises(ShapeError, match="bounds"):
        optimise_plan(losses, costs, [1.0])
    with pytest.raises(ShapeError, match="losses"):
        optimise_plan(losses[0], costs, bounds)
    with pytest.raises(ArgumentError, match="finite"):
        optimise_plan(losses * math.inf, costs, bounds)
    for options in ({"heads_per_layer": 3}, {"max_rules_per_layer": 0}, {"points": 1}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            optimise_plan(losses, costs, bounds, **options)


def test_a_local_and_a_long_range_head_get_their_rules():
    """Head 0 of either layer looks at its neighbours, head 1 everywhere: the long one grows with the text."""
    influence = {}
    for n in (64, 128):
        gap = torch.arange(n)[:, None] - torch.arange(n)
        logits = torch.stack([-2.0 * gap, torch.zeros(n, n)]).expand(2, 2, n, n)
        generator = torch.Generator().manual_seed(n)
        eye, v = torch.eye(n).expand(2, 2, n, n), torch.randn(2, 2, n, 8, generator=generator)
        grad = torch.randn(2, 2, n, 8, generator=generator)
        influence[n] = attention_influence(logits, eye, v, grad, block_size=8, scale=1.0)
    space = ElasticSpace.default([64, 128], [256], interval=32, block_size=8)
    for plan in search_plans(influence, 0.5, other_lengths=[256], space=space, lower_ratio=None, gap=0):
        spans = plan.spans(64)
        for layer in range(2):
            assert plan.betas[layer][1] > 0
            assert plan.alphas[layer][0] <= 0
            assert spans[layer, 0] == 16  # the least there is
            assert spans[layer, 1] >= 32


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = MoAPlan([[0, -128], [512, 64]], [[0.5, 0.25], [0, 0.125]])
    plan.to_json(tmp_path / "plan.json")
    assert MoAPlan.from_json(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "alphas": [[0, -128], [512, 64]],
        "betas": [[0.5, 0.25], [0, 0.125]],
    }
    small = MoAPlan([[1]], [[0.5]], block_size=4)
    small.to_json(tmp_path / "small.json")
    assert MoAPlan.from_json(tmp_path / "small.json") == small


@given(st.floats(-512, 2048), st.floats(0, 1), st.integers(1, 4000), st.integers(0, 1000), st.sampled_from([1, 8, 64]))
def test_spans_are_the_rule_in_whole_blocks(alpha, beta, prompt, new, block):
    plan = MoAPlan([[alpha]], [[beta]], block)
    wanted = max(min(int(alpha + beta * (prompt + new)), prompt + new), 2 * block)
    (span,) = plan.spans(prompt, new)[0].tolist()
    assert span % block == 0
    assert wanted <= span < wanted + block
    assert plan.sinks(prompt, new).item() == min(span, block)


def test_density_is_the_mean_share():
    plan = MoAPlan([[0, 0]], [[0.25, 1.0]], block_size=4)
    assert plan.density(64) == (16 + 64) / 2 / 64
    assert MoAPlan.uniform(3, 2, alpha=32, block_size=4).density(64) == 0.5
    assert MoAPlan.uniform(3, 2).shape == (3, 2)


def test_plans_refuse(tmp_path):
    for alphas, betas, message in (
        ([[1]], [[1, 2]], "same number of heads"),
        ([[1], [1, 2]], [[1], [1, 2]], "same number of heads"),
        ([], [], "same number of heads"),
        ([[math.nan]], [[1]], "alphas must be finite"),
    ):
        with pytest.raises(ArgumentError, match=message):
            MoAPlan(alphas, betas)
    with pytest.raises(ArgumentError, match="block_size"):
        MoAPlan([[1]], [[1]], 0)
    with pytest.raises(ArgumentError, match="prompt_len"):
        MoAPlan([[1]], [[1]]).spans(0)
    with pytest.raises(ArgumentError, match="cannot read"):
        MoAPlan.from_json(tmp_path / "none.json")
    for content in ("[]", "{}", "no", '{"alphas": 3, "betas": 4}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ArgumentError, match="holds no plan"):
            MoAPlan.from_json(tmp_path / "bad.json")


# --- the mask -------------------------------------------------------------------------------------------------------


@given(st.data())
def test_mask_of_spans_is_exact(data):
    heads = data.draw(st.integers(1, 4))
    windows = tuple(data.draw(st.integers(1, 15)) for _ in range(heads))
    sinks = tuple(data.draw(st.integers(0, 9)) for _ in range(heads))
    mask = Spans(windows, sinks)
    want = masks.per_head(
        [
            masks.sliding_window(w, causal=True) | (masks.causal() & masks.sinks(s))
            for w, s in zip(windows, sinks, strict=True)
        ]
    ).dense(14)
    assert torch.equal(mask.dense(14), want)
    ends = [sorted(data.draw(st.lists(st.integers(0, 14), min_size=2, max_size=2, unique=True))) for _ in range(2)]
    (q0, q1), (k0, k1) = ends
    some, every = mask.rect(*(torch.tensor([x]) for x in (q0, q1, k0, k1)))
    cut = want[:, q0:q1, k0:k1].flatten(1)
    assert some.expand(1, heads, 1).flatten().tolist() == cut.any(1).tolist()
    assert every.expand(1, heads, 1).flatten().tolist() == cut.all(1).tolist()


def test_masks_of_a_plan():
    plan = MoAPlan([[8, 8], [4, 8], [0, 0]], [[0, 0], [0, 0.5], [1, 1]], block_size=2)
    alike, own, full = plan.mask(20, num_groups=2)
    assert alike.heads is None
    assert full == masks.causal()
    q, k = torch.arange(20)[:, None], torch.arange(20)
    assert torch.equal(alike.dense(20), (k <= q) & ((k < 2) | (q - k < 6)))
    for head, span in enumerate((4, 4, 18, 18)):
        assert torch.equal(own.dense(20)[head], (k <= q) & ((k < 2) | (q - k < span - 2)))
    with pytest.raises(ArgumentError, match="exceed their sinks"):
        span_mask([4], [4], 10)


def test_query_heads_share_the_largest_influence():
    found = torch.rand(2, 6, 3, 3)
    got = per_kv_head(found, 2)
    assert torch.equal(got[:, 1], found[:, 3:].amax(1))
    assert per_kv_head(found, None) is found
    with pytest.raises(ArgumentError, match="num_kv_heads must divide"):
        per_kv_head(found, 4)
