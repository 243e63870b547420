"""MQSA-TED: its losses by hand, its scoring, and that it learns transitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.models.recommendation.mqsa import MQSA, ted_losses, transition_counts, transition_distillation_loss
from regard.tasks.metrics import hit_rate, ndcg

SEQ = torch.tensor([[7, 7, 1, 2, 3], [0, 4, 6, 5, 5]])


def model(**config) -> MQSA:
    torch.manual_seed(0)
    return MQSA(**{"num_items": 7, "dim": 8, "max_length": 5, "num_heads": 2, **config}).eval()


def test_counts() -> None:
    counts = transition_counts([[0, 1, 2, 1], [1, 2], [3]], 4, span=2)
    assert counts.is_sparse
    want = torch.zeros(4, 4)
    for i, j in [(0, 1), (1, 2), (2, 1), (0, 2), (1, 1), (1, 2)]:
        want[i, j] += 1
    assert torch.equal(counts.to_dense(), want)
    assert not transition_counts([], 4).to_dense().any()


def test_distillation_is_its_sums() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(5, 4, dtype=torch.float64) * 0.1
    table = transition_counts([[0, 1, 2, 3, 0, 1, 0, 2]], 5)
    items = [0, 1, 1, 4]
    want = 0.0
    for i in items:
        row = table.to_dense()[i].double()
        teacher = [math.exp(float(c) / (max(row.max().item(), 1e-24)) / 0.5) for c in row]
        student = [math.exp(2.0 * float(embedding[i] @ e) / 0.5) for e in embedding]
        terms = zip(teacher, student, strict=True)
        want -= sum(t / sum(teacher) * math.log(s / sum(student)) for t, s in terms) / len(items)
    index = torch.tensor(items)
    got = transition_distillation_loss(embedding, index, table.index_select(0, index), tau=0.5)
    assert got.item() == pytest.approx(want)
    embedding.requires_grad_()
    rows = table.to_dense()[index]
    assert torch.autograd.gradcheck(lambda e: transition_distillation_loss(e, index, rows, 0.5), (embedding,))


def test_losses_add_up_and_leave_out_padding() -> None:
    recommender = model()
    targets = torch.tensor([[7, 7, 2, 3, 0], [4, 6, 5, 5, 1]])
    items = SEQ[SEQ != 7]
    rows = torch.rand(len(items), 7)
    got = ted_losses(recommender, SEQ, targets, items, rows, weight=0.3, l2=0.01)
    logits, real = recommender(SEQ), targets != 7
    torch.testing.assert_close(got.recommendation, F.cross_entropy(logits[real], targets[real]))
    squares = sum(p.square().sum() for p in recommender.parameters()) / 2
    torch.testing.assert_close(got.total, got.recommendation + 0.3 * got.distillation + 0.01 * squares)


def test_logits_are_those_of_the_two_branches() -> None:
    both, short, long = (model(alpha=alpha)(SEQ) for alpha in (0.25, 1.0, 0.0))
    torch.testing.assert_close(both, 0.25 * short + 0.75 * long)
    assert not torch.allclose(short, long)
    assert not both[..., -1].any()


def test_no_item_sees_later_ones_or_padding() -> None:
    recommender = model(window_size=3, num_layers=2)
    other = SEQ.clone()
    other[:, 4] = 0
    torch.testing.assert_close(recommender(other)[:, :4], recommender(SEQ)[:, :4])
    torch.testing.assert_close(recommender(SEQ[:1, 2:]), recommender(SEQ[:1])[:, 2:])


def test_seen_items_are_recommended_last() -> None:
    recommender = model()
    seen = torch.zeros(2, 7, dtype=torch.bool)
    seen[0, [1, 2, 3]] = True
    order = recommender.recommend(SEQ, 7, seen)
    assert set(order[0, 4:].tolist()) == {1, 2, 3}
    assert torch.equal(order[1], recommender.score(SEQ)[1].argsort(descending=True))


def test_it_learns_a_chain_of_items() -> None:
    torch.manual_seed(0)
    recommender = MQSA(num_items=10, dim=16, max_length=8, dropout=0.1).train()
    chain = (torch.arange(10)[:, None] + torch.arange(9)) % 10  # i is followed by i + 1
    seq, targets = chain[:, :-1], chain[:, 1:]
    table = transition_counts(chain.tolist(), 10).to_dense()
    optimizer = torch.optim.Adam(recommender.parameters(), 0.01)
    for _ in range(60):
        items = seq.flatten()
        optimizer.zero_grad()
        ted_losses(recommender, seq, targets, items, table[items]).total.backward()
        optimizer.step()
    scores, wanted = recommender.eval().score(seq), targets[:, -1]
    assert hit_rate(scores, wanted, 1) == 1.0
    assert ndcg(scores, wanted, 10) == 1.0


def test_official_names_of_more_blocks() -> None:
    """Numbers of variables run through the blocks of a branch, then through the other branch."""
    recommender, d = model(num_layers=2), 8
    state = {
        "item_embedding/item_embedding": torch.randn(7, d),
        "positional_embedding/position_embedding": torch.randn(5, d),
    }
    for branch in ("short", "long"):
        for i in range(10):
            state[f"block_{branch}_query/Variable" + (f"_{i}" if i else "")] = torch.randn(d)
    for i in range(20):
        name = "dense" + (f"_{i}" if i else "")
        state |= {f"{name}/kernel": torch.randn(d, d), f"{name}/bias": torch.randn(d)}
    kwargs = {"num_item": 7, "num_factor": d, "max_len": 5, "num_block": 2, "num_head": 2}
    loaded = MQSA.from_official(state, **kwargs)
    assert recommender.state_dict().keys() == loaded.state_dict().keys()
    assert torch.equal(loaded.long[1].mlp.fc2.weight, state["dense_19/kernel"].T)
    assert torch.equal(loaded.short[1].attn.norm.bias, state["block_short_query/Variable_4"])
    assert torch.equal(loaded.long[1].norm.weight, state["block_long_query/Variable_7"])
    assert torch.equal(loaded.long_norm.bias, state["block_long_query/Variable_8"])


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="num_items: expected"):
        MQSA(0)
    with pytest.raises(ArgumentError, match="alpha"):
        model(alpha=1.5)
    with pytest.raises(ArgumentError, match="span"):
        transition_counts([], 3, span=0)
    with pytest.raises(ArgumentError, match="sequences: expected items from 0 to 2"):
        transition_counts([[0, 3]], 3)
    with pytest.raises(ArgumentError, match="k: expected 1 to 7"):
        model().recommend(SEQ, 8)
    with pytest.raises(ShapeError, match="seq: expected"):
        model()(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ShapeError, match="seen: expected"):
        model().score(SEQ, torch.zeros(1, 7))
    with pytest.raises(ShapeError, match="counts: expected"):
        transition_distillation_loss(torch.randn(3, 2), torch.tensor([0]), torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="tau"):
        transition_distillation_loss(torch.randn(3, 2), torch.tensor([0]), torch.ones(1, 3), tau=0.0)
