"""ACT: the card's equations in loops, on weights and in models; without weights, padded, in pieces, and searched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import regard
from regard import masks
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.methods import create
from regard.methods.language.act import (
    ACT,
    by_layer,
    calibrate_attention,
    column_average,
    find_sinks,
    head_gains,
    search_heads,
)
from regard.probes import recorded_averages, recorded_sinks
from regard.sites import Call, Method
from tests.tiny_models import NAMES, tiny


def causal_weights(*shape: int, seed: int = 0, peaked: float = 2.0) -> Tensor:
    """(B, H, N, N) with some strong columns."""
    g = torch.Generator().manual_seed(seed)
    b, h, n = shape
    scores = torch.randn(b, h, n, n, generator=g) + peaked * torch.randn(b, h, 1, n, generator=g)
    return scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)


def naive(a: list[list[float]], beta: float, threshold: float, protect: bool = True) -> list[list[float]]:
    """One head by the card, in plain Python; a row wholly on sinks stays."""
    n = len(a)
    average = [sum(a[i][j] for i in range(n)) / (n - j) for j in range(n)]
    sinks = [j for j in range(n) if average[j] > threshold][1 if protect else 0 :]
    rows = []
    for i in range(n):
        freed = (1 - beta) * sum(a[i][j] for j in sinks)
        rest = sum(a[i][j] for j in range(n) if j not in sinks)
        if rest == 0:
            rows.append(a[i])
            continue
        rows.append([beta * a[i][j] if j in sinks else a[i][j] + freed * a[i][j] / rest for j in range(n)])
    return rows


@given(
    n=st.integers(1, 20),
    seed=st.integers(0, 100),
    beta=st.sampled_from([0.0, 0.4, 0.9]),
    threshold=st.sampled_from([0.02, 0.1, 0.3]),
    protect=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_loops(n: int, seed: int, beta: float, threshold: float, protect: bool) -> None:
    a = causal_weights(2, 3, n, seed=seed).double()
    got = calibrate_attention(a, [2, 0], beta, threshold, protect)
    for b in range(2):
        for h in (0, 2):
            want = torch.tensor(naive(a[b, h].tolist(), beta, threshold, protect), dtype=torch.float64)
            torch.testing.assert_close(got[b, h], want, atol=1e-12, rtol=0)
    assert torch.equal(got[:, 1], a[:, 1])


def test_promises_on_weights() -> None:
    """Rows sum to 1, nothing looks ahead, sinks keep beta, the others keep their ratios; beta = 1 changes nothing."""
    a, beta = causal_weights(2, 4, 32), 0.4
    got = calibrate_attention(a, range(4), beta)
    sinks = find_sinks(a)
    assert (sinks.sum(-1) >= 2).all()
    hidden = sinks & (sinks.cumsum(-1) > 1)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, 32), atol=1e-6, rtol=0)
    assert torch.equal(got.triu(1), torch.zeros_like(got))
    where = hidden[:, :, None].expand_as(a)[:, :, 1:] & (a[:, :, 1:] > 0)
    torch.testing.assert_close(got[:, :, 1:][where], beta * a[:, :, 1:][where])
    growth = (got / a).masked_fill(where.new_zeros(1) | hidden[:, :, None] | (a == 0), torch.nan)
    low, high = growth.nan_to_num(torch.inf).amin(-1), growth.nan_to_num(0.0).amax(-1)
    torch.testing.assert_close(low, high, atol=1e-5, rtol=1e-5)
    assert (high[..., 1:] > 1).any()
    torch.testing.assert_close(calibrate_attention(a, range(4), beta=1.0), a, atol=1e-7, rtol=0)


def test_by_hand() -> None:
    """Keys 0 and 1 are sinks; 1 gives 0.6 of its weight to 0 and 2 in proportion."""
    a = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.3, 0.6, 0.1]])[None, None]
    torch.testing.assert_close(column_average(a)[0, 0], torch.tensor([0.6, 0.55, 0.1]))
    assert find_sinks(a, 0.1)[0, 0].tolist() == [True, True, False]  # 0.1 is not above 0.1
    assert find_sinks(a, "1.7/N")[0, 0].tolist() == [True, False, False]  # above 0.5667
    want = torch.tensor([[1.0, 0, 0], [0.8, 0.2, 0], [0.3 + 0.36 * 0.75, 0.24, 0.1 + 0.36 * 0.25]])
    torch.testing.assert_close(calibrate_attention(a, [0])[0, 0], want)
    unprotected = calibrate_attention(a, [0], protect_first=False)[0, 0]
    torch.testing.assert_close(unprotected[:2], a[0, 0, :2])  # all of these rows lies on sinks
    torch.testing.assert_close(unprotected[2], torch.tensor([0.12, 0.24, 0.64]))


def test_padding_does_not_count_on_weights() -> None:
    a = causal_weights(1, 2, 12, seed=3)
    padded = torch.zeros(1, 2, 17, 17)
    padded[..., 5:, 5:] = a
    padded[..., :5, :5] = torch.eye(5)  # what padding looks at
    valid = torch.arange(17)[None] >= 5
    torch.testing.assert_close(column_average(padded, valid)[..., 5:], column_average(a))
    assert torch.equal(find_sinks(padded, "2/N", valid)[..., 5:], find_sinks(a, "2/N"))
    got = calibrate_attention(padded, [0, 1], threshold=0.05, valid=valid)
    torch.testing.assert_close(got[..., 5:, 5:], calibrate_attention(a, [0, 1], threshold=0.05))


class Naive(Method):
    """ACT through the weights, which it makes exist; batches of one, with running sums over the pieces of a text."""

    def __init__(self, act: ACT) -> None:
        super().__init__()
        self.act, self.sums = act, {}

    def weights(self, call: Call, weights: Tensor) -> Tensor:
        heads = (self.act.only_heads or {}).get(call.site.index)
        heads = range(weights.shape[1]) if self.act.only_heads is None else heads or []
        n, m = weights.shape[-2:]
        sums = self.sums.get(call.site.index, torch.zeros(weights.shape[1], 0)) if n < m else None
        total = weights[0].sum(1)
        if sums is not None:
            total[:, : sums.shape[1]] += sums
        self.sums[call.site.index] = total
        out = weights.clone()
        for h in heads:
            average = [float(total[h, j]) / (m - j) for j in range(m)]
            bar = self.act.threshold if isinstance(self.act.threshold, float) else 3 / m
            hidden = [j for j in range(m) if average[j] > bar][1 if self.act.protect_first else 0 :]
            for i in range(n):
                p = sum(float(weights[0, h, i, j]) for j in hidden)
                if p < 1 - 1e-6:
                    out[0, h, i] *= 1 + (1 - self.act.beta) * p / (1 - p)
                    out[0, h, i, hidden] = self.act.beta * weights[0, h, i, hidden]
        return out


def ids(n: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "method",
    [
        ACT(only_heads={0: [1, 2], 2: [3]}, threshold=0.08),
        ACT(threshold="3/N", beta=0.1),
        ACT(layers=[1], protect_first=False, threshold=0.08),
    ],
    ids=str,
)
@torch.no_grad()
def test_without_weights_equals_with_weights(method: ACT) -> None:
    """In one forward, and in a prompt, single tokens and another piece."""
    model, x = tiny("llama"), ids(30)
    oracle = Naive(method)
    oracle.layers = method.layers
    logits = []
    for what in (method, oracle):
        with regard.apply(model, what):
            once = model(x, use_cache=False).logits
            cache = DynamicCache(config=model.config)
            cuts = ((0, 18), (18, 19), (19, 20), (20, 26), (26, 30))
            logits.append([once, *(model(x[:, a:b], past_key_values=cache).logits for a, b in cuts)])
    for got, want in zip(*logits, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert (logits[0][0] - model(x).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_on_models(name: str) -> None:
    model, x = tiny(name), ids(24)
    layers = [1] if name == "gemma3" else None
    method = ACT(layers=layers, threshold="3/N")
    oracle = Naive(method)
    oracle.layers = layers
    with regard.apply(model, oracle):
        want = model(x).logits
    with regard.apply(model, method):
        got = model(x).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_beta_one_is_the_model() -> None:
    model, x = tiny("llama"), ids(24)
    want = model(x).logits
    with regard.apply(model, ACT(beta=1.0, threshold=0.05)):
        torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)
    for nothing in ({}, {1: []}):
        with regard.apply(model, ACT(only_heads=nothing)):
            torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding_batches_and_beams() -> None:
    model, x = tiny("llama"), ids(24, batch=2)
    padding = torch.ones_like(x)
    padding[0, :9] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    method = ACT(threshold="3/N")
    with regard.apply(model, method):
        both = model(x, attention_mask=padding, position_ids=positions).logits
        torch.testing.assert_close(both[:1, 9:], model(x[:1, 9:]).logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both[1:], model(x[1:]).logits, atol=1e-5, rtol=1e-4)
        arguments = {"max_new_tokens": 6, "num_beams": 2, "pad_token_id": 0, "do_sample": False}
        tokens = model.generate(x, attention_mask=padding, **arguments)
        alone = model.generate(x[:1, 9:], **arguments)
    assert torch.equal(tokens[:1, 9:][:, : alone.shape[1]], alone)


@torch.no_grad()
def test_the_sums_follow_their_rows() -> None:
    """A cache that is reordered, repeated and copied goes on as the texts themselves would."""
    model, x = tiny("llama"), ids(16, batch=2)
    with regard.apply(model, ACT(threshold="3/N")):
        cache = DynamicCache(config=model.config)
        model(x[:, :12], past_key_values=cache)
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        want = model(x[:, 12:], past_key_values=cache).logits
        got = model(x[[1, 0], 12:], past_key_values=swapped).logits
    torch.testing.assert_close(got[[1, 0]], want, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_masks_that_tell_heads_apart() -> None:
    """Only the chosen heads' part of another method's mask is read."""

    class HidesFromHeads(Method):
        def mask(self, call: Call) -> masks.Mask:
            n, m = call.query.shape[2], call.key.shape[2]
            table = torch.ones(1, 4, n, m, dtype=torch.bool)
            table[:, 1, :, 2:5] = table[:, 3, :, 6] = False
            return masks.from_dense(table | torch.eye(n, m, dtype=torch.bool))

    model, x = tiny("llama"), ids(20)
    method = ACT(only_heads={0: [3, 1], 1: [1]}, threshold="3/N")
    with regard.apply(model, [HidesFromHeads(), Naive(method)]):
        want = model(x).logits
    with regard.apply(model, [HidesFromHeads(), method]):
        torch.testing.assert_close(model(x).logits, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_recorded_sinks_are_those_of_the_weights() -> None:
    model, x = tiny("llama"), ids(40, batch=2)
    padding = torch.ones_like(x)
    padding[1, :7] = 0
    valid = padding.bool()
    inputs = {"input_ids": x, "attention_mask": padding, "position_ids": (padding.cumsum(-1) - 1).clamp(min=0)}
    found = regard.record(model, inputs)
    model.set_attn_implementation("eager")
    for layer, weights in enumerate(model(**inputs, output_attentions=True).attentions):
        average = column_average(weights, valid).masked_fill(~valid[:, None], 0.0)
        torch.testing.assert_close(recorded_averages(found)[layer], average, atol=1e-6, rtol=1e-5)
        for threshold in (0.05, "2.5/N"):
            want = find_sinks(weights, threshold, valid) & valid[:, None]
            assert torch.equal(recorded_sinks(found, threshold)[layer], want)
            assert 0 < want.sum() < want.numel() / 2


def test_search_keeps_what_helps() -> None:
    """Scores by head: what `ACT` was told to do can be read off the outputs it gives."""
    model, x = tiny("llama", num_hidden_layers=5), ids(20)
    with torch.no_grad():
        before = model(x).logits

    def evaluate(which: torch.nn.Module) -> list[float]:
        with torch.no_grad():
            change = which(x).logits - before
        return [float(change[0, -1, 5]), float(change[0, -1, 7])]

    seen = []
    arguments = {"beta": 0.2, "threshold": "3/N"}
    gains = head_gains(model, evaluate, **arguments, on_progress=lambda done, total: seen.append((done, total)))
    assert list(gains) == [(layer, head) for layer in (2, 3) for head in range(4)]
    assert seen == [(i, 9) for i in range(1, 10)]
    with regard.apply(model, ACT(only_heads={3: [2]}, **arguments)):
        assert gains[3, 2] == pytest.approx(sum(evaluate(model)) / 2, abs=1e-7)
    found = search_heads(model, evaluate, **arguments)
    assert found == by_layer([head for head, gain in gains.items() if gain > 0])
    assert 0 < sum(map(len, found.values())) < 8
    assert list(head_gains(model, evaluate, heads=[(0, 1)], **arguments)) == [(0, 1)]
    assert list(head_gains(model, evaluate, [1], **arguments)) == [(1, head) for head in range(4)]


def test_by_name() -> None:
    assert create("act", only_heads={2: [1]}, beta=0.5) == ACT(only_heads={2: [1]}, beta=0.5)


def test_refuses() -> None:
    a, model = causal_weights(1, 2, 5), tiny("llama")
    for arguments, message in (
        ({"beta": 1.5}, "beta must be between 0 and 1, got 1.5"),
        ({"threshold": -0.1}, "threshold: expected a mean weight"),
        ({"threshold": "5"}, "such as '5/N', got '5'"),
        ({"threshold": "a/N"}, "such as '5/N', got 'a/N'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ACT(**arguments)
        with pytest.raises(ArgumentError, match=message):
            calibrate_attention(a, [0], **arguments)
        with pytest.raises(ArgumentError, match=message):
            head_gains(model, lambda _: 0.0, **arguments)
    with pytest.raises(ArgumentError, match=r"heads: expected different ones of 0..1, got \[2\]"):
        calibrate_attention(a, [2])
    with pytest.raises(ShapeError, match=r"weights: expected \(B, H, N, M\) with N at most M"):
        column_average(a[0])
    with pytest.raises(ShapeError, match=r"valid: expected bool \(1, 5\)"):
        column_average(a, torch.ones(1, 4, dtype=torch.bool))
    for only_heads, message in (
        ({7: [0]}, "only_heads: the model has layers 0..2, got 7"),
        ({1: [4]}, r"only_heads of layer 1: expected different ones of 0..3, got \[4\]"),
    ):
        with pytest.raises(ArgumentError, match=message), regard.apply(model, ACT(only_heads=only_heads)):
            pass
    with (
        pytest.raises(Unsupported, match="layer 0 slides a window"),
        regard.apply(tiny("gemma3"), ACT(only_heads={0: [1]})),
    ):
        pass
    with pytest.raises(ArgumentError, match=r"layers: expected some of 0..2, got \[3\]"):
        search_heads(model, lambda _: 0.0, [3])
    with pytest.raises(ArgumentError, match=r"heads: expected \(layer, head\) pairs in place of layers"):
        search_heads(model, lambda _: 0.0, [1], heads=[(1, 1)])
