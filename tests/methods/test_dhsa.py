"""DHSA against loops written from its definition, and on models."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import regard
from regard import masks
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.methods.language import dhsa
from regard.methods.language.dhsa import (
    DHSA,
    BoundarySimilarity,
    BoundarySimilarityAttn,
    BoundarySimilarityStack,
    DHSAConfig,
    choose_keys,
    dhsa_attention,
    label_boundaries,
    load_predictor,
    mass_ratio,
    predict_boundaries,
    save_predictor,
    select_boundaries,
    uniform_boundaries,
)
from regard.methods.language.dhsa.boundaries import key_features
from regard.methods.language.dhsa.train import Example, boundary_f1, examples, train_predictor
from regard.methods.language.sliding_window import SlidingWindow
from regard.sites import Call, Method
from tests.tiny_models import NAMES, tiny


def qkv(n: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, n, 6) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(s, generator=g) for s in shapes)  # type: ignore[return-value]


def cuts(length: int, *inner: int) -> list[int]:
    return [0, *inner, length]


# --- predictors -----------------------------------------------------------------------------------------------------

PREDICTORS = {
    "attn": BoundarySimilarityAttn(12, 4, d_h=8, heads=2, window_pool=True),
    "stack": BoundarySimilarityStack(12, 2, 4, d_h=8, heads=2),
    "conv": BoundarySimilarity(12, 4, d_h=8, d_in=8),
}


@pytest.mark.parametrize("kind", PREDICTORS)
@torch.no_grad()
def test_predictors_look_at_their_window_only(kind: str) -> None:
    predictor = PREDICTORS[kind].eval()
    x = torch.randn(1, 12, 40)
    changed = x.clone()
    changed[:, :, 20] += 1
    different = (predictor(x) != predictor(changed))[0].nonzero().flatten().tolist()
    assert different == list(range(16, 24))  # token 20 is the last of 16's window and the first of 23's


@torch.no_grad()
def test_convolutional_predictor() -> None:
    """The published convolutional variant, position by position."""
    p = PREDICTORS["conv"].eval()
    x = torch.randn(2, 12, 9)
    padded = torch.nn.functional.pad(x, (3, 4))
    depthwise, _, pointwise, _ = p.enc
    for t in range(9):
        halves = []
        for start in (t, t + 4):
            tokens = padded[:, :, start : start + 4]
            mixed = ((tokens * depthwise.weight[:, 0]).sum(-1) + depthwise.bias).relu()
            halves.append((mixed @ pointwise.weight[:, :, 0].T + pointwise.bias).relu())
        left, right = halves
        cos = torch.nn.functional.cosine_similarity(left, right, eps=1e-6)[:, None]
        want = p.mlp(torch.cat((left, right, (left - right).abs(), left * right, cos), -1))[:, 0]
        torch.testing.assert_close(p(x)[:, t], want)


@torch.no_grad()
def test_long_inputs_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, x = PREDICTORS["attn"].eval(), torch.randn(2, 12, 50)
    whole = predictor(x)
    monkeypatch.setattr(dhsa.predictor, "_WINDOWS_AT_ONCE", 7)
    torch.testing.assert_close(predictor(x), whole)


def test_predictors_learn_where_content_changes() -> None:
    """Segments of alternating topics: after training, predicted starts match the true ones, uniform cuts do not."""
    g = torch.Generator().manual_seed(0)
    topics = torch.randn(6, 12, generator=g)

    def document(length: int = 300) -> tuple[Tensor, list[int]]:
        starts, tokens, topic = [], [], 0
        while len(tokens) < length:
            starts.append(len(tokens))
            topic = (topic + 1 + int(torch.randint(5, (1,), generator=g))) % 6
            tokens += [topics[topic]] * int(torch.randint(12, 30, (1,), generator=g))
        x = torch.stack(tokens[:length]) + 0.7 * torch.randn(length, 12, generator=g)
        return x.T[None], starts[1:]

    torch.manual_seed(0)
    predictor = BoundarySimilarityAttn(12, 4, d_h=32, heads=2)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=2e-3)
    for _ in range(60):
        x, starts = document()
        target = torch.zeros(1, 300)
        target[0, [s - 1 for s in starts]] = 1
        loss = dhsa.focal_bce(predictor(x), target, torch.ones_like(target), pos_weight=torch.tensor(5.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    predictor.eval()
    learnt, uniform = [], []
    for _ in range(10):
        x, starts = document()
        key = x.mT[:, None]
        (cut,), _ = predict_boundaries(predictor, key, num_chunks=len(starts), nms_window_size=8)
        learnt.append(boundary_f1(cut, cuts(300, *starts)))
        uniform.append(boundary_f1(uniform_boundaries(300, 300 // (len(starts) + 1)), cuts(300, *starts)))
    assert sum(learnt) / 10 > 0.8
    assert sum(uniform) / 10 < 0.4


def test_predictors_survive_a_file(tmp_path: Path) -> None:
    arguments = {"channel_in": 12, "window_size": 4, "d_h": 8, "heads": 2, "window_pool": True}
    predictor = BoundarySimilarityAttn(**arguments).eval()
    save_predictor(predictor, tmp_path / "p.safetensors", arguments)
    x = torch.randn(1, 12, 30)
    torch.testing.assert_close(load_predictor(tmp_path / "p.safetensors")(x), predictor(x), atol=1e-2, rtol=0)


def test_refuses_files_that_are_no_predictors(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no")
    for path in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(ArgumentError, match="as a saved boundary predictor"):
            load_predictor(path)


def test_predictors_refuse_other_channels() -> None:
    with pytest.raises(ShapeError, match=r"expected shape \(batch, 12, length\)"):
        PREDICTORS["attn"](torch.randn(1, 8, 30))


# --- boundaries -----------------------------------------------------------------------------------------------------


def test_select_boundaries() -> None:
    scores = torch.tensor([0.0, 5.0, 4.0, 0.0, 0.0, 3.0, 0.0, 2.0, 0.0, 1.0])
    assert select_boundaries(scores, 3, nms_window_size=1) == [0, 2, 6, 8, 10]
    assert select_boundaries(scores, 3, nms_window_size=3) == [0, 2, 6, 10]
    assert select_boundaries(scores, 3, theta=2.5, nms_window_size=1) == [0, 2, 6, 10]
    assert select_boundaries(scores, 9, theta=9.0) == [0, 10]
    assert select_boundaries(scores, 3, nms_window_size=1, instruction_tokens=4) == [0, 2, 4, 7, 10]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_boundaries_are_separated_and_few(length: int, num_chunks: int, nms: int, seed: int) -> None:
    scores = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    found = select_boundaries(scores, num_chunks, nms_window_size=nms)
    assert found[0] == 0
    assert found[-1] == length
    inner = found[1:-1]
    assert len(found) <= num_chunks + 2
    assert all(b - a > nms for a, b in itertools.pairwise(inner))


@pytest.mark.parametrize("horizon", [None, 9])
@pytest.mark.parametrize("smooth_ends", [False, True])
def test_mass_ratio(horizon: int | None, smooth_ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition, from the whole matrix of weights; computed in several blocks of queries."""
    n, w = 40, 3
    q, k, _ = qkv(n)
    weights = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(6)).masked_fill(~masks.causal().dense(n), -math.inf)
    a = weights.softmax(-1).mean(1).double()
    monkeypatch.setattr(dhsa.boundaries, "_WEIGHTS_AT_ONCE", 2 * 4 * n * 7)
    got = mass_ratio(q, k, w, horizon=horizon, smooth_ends=smooth_ends)
    reach = 2 * w if smooth_ends else w
    for b in range(2):
        for t in range(n):
            if not reach - 1 <= t < n - reach:
                assert got[b, t] == 0
                continue
            rows = a[b, t + w : n if horizon is None else t + w + horizon]
            past, future = float(rows[:, t - w + 1 : t + 1].sum()), float(rows[:, t + 1 : t + w + 1].sum())
            want = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
            assert float(got[b, t]) == pytest.approx(want, rel=1e-5)


def test_label_boundaries_find_where_attention_changes() -> None:
    """Later queries look at the keys of one segment only: its edges are labelled."""
    n = 60
    q = torch.zeros(1, 1, n, 2)
    k = torch.zeros(1, 1, n, 2)
    q[..., 0] = 3.0
    k[:, :, 20:35, 0] = 2.0
    (found,), _ = label_boundaries(q, k, num_chunks=2, nms_window_size=4)
    assert found == [0, 20, 35, 60]


# --- training on a model's own attention ----------------------------------------------------------------------------


def test_examples_are_what_the_model_attends_to() -> None:
    model, texts = tiny("llama"), [ids(40, batch=1), ids(25, batch=1)]
    found = examples(model, texts, window_size=3, layers=[0, 2])
    assert [tuple(e.features.shape) for e in found] == [(1, 16, 40)] * 2 + [(1, 16, 25)] * 2
    model.set_attn_implementation("eager")
    with torch.no_grad():
        a = model(texts[0], output_attentions=True).attentions[2][0].mean(0)
    past, future = float(a[20 + 3 :, 18:21].sum()), float(a[20 + 3 :, 21:24].sum())
    want = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    assert float(found[1].ratio[0, 20]) == pytest.approx(want, rel=1e-4)


def test_training_fits_the_labels() -> None:
    data = examples(tiny("llama"), [ids(60, batch=1)], layers=[0])
    torch.manual_seed(0)
    losses: list[float] = []
    predictor = train_predictor(
        BoundarySimilarityAttn(16, 4, d_h=16, heads=2),
        data,
        epochs=150,
        lr=5e-3,
        alpha=20.0,
        progress=lambda epoch, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0]
    labelled = data[0].ratio > 0
    fitted, wanted = predictor(data[0].features)[labelled], data[0].ratio[labelled].log()
    assert torch.corrcoef(torch.stack((fitted, wanted)))[0, 1] > 0.8
    assert not predictor.training
    with pytest.raises(ArgumentError, match="at least one example"):
        train_predictor(predictor, [])


def test_boundary_f1() -> None:
    assert boundary_f1([0, 10, 20, 40], [0, 12, 20, 40]) == 1.0
    assert boundary_f1([0, 10, 20, 40], [0, 12, 30, 40]) == 0.5
    assert boundary_f1([0, 40], [0, 12, 40]) == 0.0


def test_positions_without_a_label_do_not_count() -> None:
    example = Example(torch.randn(1, 16, 20), torch.zeros(1, 20))
    predictor = BoundarySimilarityAttn(16, 4, d_h=4, heads=2)
    before = [p.clone() for p in predictor.parameters()]
    train_predictor(predictor, [example])
    assert all(torch.equal(a, b) for a, b in zip(before, predictor.parameters(), strict=True))


# --- the choice and the attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["avgpool", "avgpool_norm", "maxpool"])
@pytest.mark.parametrize("window", [None, 20])
def test_choice_is_what_a_loop_finds(pooling: str, window: int | None) -> None:
    n, b = 53, 8
    q, k, _ = qkv(n, batch=1)
    edges = cuts(n, 5, 11, 12, 24, 30, 41)
    config = DHSAConfig(b, 16, pooling, global_tokens=2, local_tokens=4, instruction_tokens=0, dedupe=True)
    got = choose_keys(q, k, [edges], config, window)
    mean_q, mean_k = q[0].mean(0), k[0].mean(0)
    for i in range(-(-n // b)):
        tokens = mean_q[i * b : (i + 1) * b]
        low = 0 if window is None else max(0, i * b - window + 1)
        stop = min(n, (i + 1) * b)
        if pooling == "maxpool":
            block = (
                torch.cat((tokens, torch.zeros(b - len(tokens), 6))).max(0).values
                if len(tokens) < b
                else tokens.max(0).values
            )
        else:
            block = tokens.sum(0)  # any positive factor leaves the order
        score = {}
        for s, e in itertools.pairwise(edges):
            summary = mean_k[s:e].sum(0) / (math.sqrt(e - s) if pooling == "avgpool_norm" else e - s)
            score |= {j: float(block @ summary) for j in range(s, e)}
        kept = [j for j in got[0, i].tolist() if j >= 0]
        assert kept == sorted(set(kept))
        assert len(kept) == min(16, stop - low)
        forced = {*range(max(low, stop - 4), stop), *range(low, min(low + 2, stop))}
        assert forced <= set(kept) <= set(range(low, stop))
        worst = min((score[j] for j in set(kept) - forced), default=math.inf)
        left = [score[j] for j in range(low, stop) if j not in kept]
        assert all(x <= worst + 1e-5 for x in left)


@given(st.integers(1, 40), st.integers(0, 12), st.booleans(), st.sampled_from([None, 10]))
@settings(max_examples=40, deadline=None)
def test_choice_is_causal(n: int, instruction: int, dedupe: bool, window: int | None) -> None:
    """Keys after a block change neither its choice (beyond filling up lists, as published) nor its output."""
    b = 4
    q, k, v = qkv(n, batch=1)
    config = DHSAConfig(b, 7, global_tokens=2, local_tokens=3, instruction_tokens=instruction, dedupe=dedupe)
    edges = [uniform_boundaries(n, 3)]
    out, _ = dhsa_attention(q, k, v, edges, config, window=window)
    for i in range(0, n, b):
        later = [x.clone() for x in (q, k, v)]
        stop = -(-(i + b) // 3) * 3  # a chunk that straddles the block's end is summarised whole, as published
        for x in later:
            x[:, :, stop:] += 5
        changed, _ = dhsa_attention(*later, edges, config, window=window)
        torch.testing.assert_close(changed[:, :, : min(i + b, n)], out[:, :, : min(i + b, n)])


@pytest.mark.parametrize("window", [None, 10])
def test_output_is_softmax_over_the_chosen(window: int | None) -> None:
    n, b = 45, 8
    q, k, v = qkv(n)
    edges = [cuts(n, 4, 20, 33), cuts(n, 10)]
    config = DHSAConfig(b, 14, global_tokens=3, local_tokens=5, instruction_tokens=6, dedupe=True)
    causal = masks.causal() if window is None else masks.causal() & masks.sliding_window(window)
    out, indices = dhsa_attention(q, k, v, edges, config, window=window, mask=causal, scale=0.3)
    table = torch.zeros(2, n, n, dtype=torch.bool)
    for item in range(2):
        for i in range(n):
            keys = indices[item, i // b] if i < n - 6 else torch.arange(n)
            table[item, i, keys[keys >= 0]] = True
    want = regard.attention(q, k, v, mask=masks.from_dense(table[:, None]) & causal, scale=0.3, backend="reference")
    torch.testing.assert_close(out, want)


def test_published_lists_count_repeated_keys_twice() -> None:
    n, b = 24, 8
    q, k, v = qkv(n, batch=1)
    config = DHSAConfig(b, 12, global_tokens=4, local_tokens=4, instruction_tokens=0)
    out, indices = dhsa_attention(q, k, v, [uniform_boundaries(n, 4)], config)
    for i in range(n):
        keys = [j for j in indices[0, i // b].tolist() if j <= i]
        scores = q[0, 1, i] @ k[0, 0, keys].T / math.sqrt(6)
        torch.testing.assert_close(out[0, 1, i], scores.softmax(-1) @ v[0, 0, keys])
    assert any(len(set(row)) < len(row) for row in indices[0].tolist())


def test_work_in_runs_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(70)
    edges = [uniform_boundaries(70, 5)] * 2
    config = DHSAConfig(8, 20, global_tokens=2, local_tokens=4, instruction_tokens=5, dedupe=True)
    whole, _ = dhsa_attention(q, k, v, edges, config)
    monkeypatch.setattr(dhsa.attention, "_MEMORY", 1)
    torch.testing.assert_close(dhsa_attention(q, k, v, edges, config)[0], whole)


def test_attended_pairs_keep_to_the_budget() -> None:
    n, budget = 256, 40
    q, k, _ = qkv(n, batch=1)
    config = DHSAConfig(16, budget, global_tokens=4, local_tokens=16, instruction_tokens=16, dedupe=True)
    one_hot = torch.eye(n).expand(1, 2, n, n)
    weights, _ = dhsa_attention(q, k, one_hot, [uniform_boundaries(n, 8)], config)
    seen = (weights > 0).sum(-1)
    assert seen[:, :, : n - 16].max() <= budget
    assert torch.equal(seen[0, 0, n - 16 :], torch.arange(n - 15, n + 1))
    scores = -(-(n - 16) // 16) * (n // 8)
    assert scores < n * n / 100  # L/b · chunks summaries are compared, not L² pairs


# --- on models ------------------------------------------------------------------------------------------------------


def ids(n: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


SMALL: dict[str, Any] = {
    "block_size": 8,
    "global_tokens": 2,
    "local_tokens": 8,
    "instruction_tokens": 6,
    "chunk_size": 4,
}


@pytest.mark.parametrize("name", [*NAMES, "mistral-sliding"])
@torch.no_grad()
def test_whole_budget_is_dense(name: str) -> None:
    model, x = tiny(name), ids(75)
    want = model(x).logits
    with regard.apply(model, DHSA(**SMALL, budget=1.0)):
        torch.testing.assert_close(model(x).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_quarter_of_the_budget_differs_and_decoding_is_dense(name: str) -> None:
    model, x = tiny(name), ids(75)
    dense = model(x).logits
    with regard.apply(model, DHSA(**SMALL)):
        prompt = model(x[:, :70])
        steps = [model(x[:, i : i + 1], past_key_values=prompt.past_key_values).logits for i in range(70, 75)]
        again = model(x[:, :70])
        piece = model(x[:, 70:], past_key_values=again.past_key_values).logits
        generated = model.generate(x, max_new_tokens=4, num_beams=2, pad_token_id=0)
    assert (prompt.logits - dense[:, :70])[:, 24:64].abs().max() > 1e-3
    torch.testing.assert_close(torch.cat(steps, dim=1), piece, atol=1e-4, rtol=1e-4)
    assert generated.shape[0] == 2


@torch.no_grad()
def test_one_sparse_layer_leaves_the_instruction_dense() -> None:
    """The last queries of a one-layer model see everything."""
    model, x = tiny("llama", num_hidden_layers=1), ids(75)
    dense = model(x).logits
    with regard.apply(model, DHSA(**SMALL)):
        sparse = model(x).logits
    torch.testing.assert_close(sparse[:, -6:], dense[:, -6:], atol=1e-5, rtol=1e-5)
    assert (sparse - dense)[:, 30:69].abs().max() > 1e-3


@dataclass(kw_only=True)
class Seen(Method):
    """Mixes one column per key along with the values: what comes out are the weights."""

    weights: list[Tensor] = field(default_factory=list)

    def qkv(self, call: Call) -> None:
        call.probe = torch.eye(call.key.shape[2])[None, None]

    def after(self, call: Call) -> None:
        self.weights.append(call.extra["probe"])


@torch.no_grad()
def test_probes_see_the_chosen_keys() -> None:
    model, x, seen = tiny("llama"), ids(75), Seen()
    with regard.apply(model, [DHSA(**SMALL, budget=20), seen]):
        model(x)
    (weights, *_) = seen.weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 75))
    assert (weights[:, :, :69] > 0).sum(-1).max() == 20
    assert (weights[:, :, -1] > 0).all()


@torch.no_grad()
def test_left_padded_rows_are_read_as_if_alone() -> None:
    model, x = tiny("llama"), ids(70)
    padding = torch.ones_like(x)
    padding[0, :13] = 0
    with regard.apply(model, DHSA(**SMALL)):
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        both = model(x, attention_mask=padding, position_ids=positions).logits
        alone = model(x[:1, 13:]).logits
        other = model(x[1:]).logits
        torch.testing.assert_close(both[:1, 13:], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both[1:], other, atol=1e-4, rtol=1e-4)
        padding[0, 40] = 0
        with pytest.raises(Unsupported, match="padded on the left"):
            model(x, attention_mask=padding)


@torch.no_grad()
def test_predicted_chunks_on_a_model(tmp_path: Path) -> None:
    model, x = tiny("llama"), ids(70)
    arguments = {"channel_in": 16, "d_h": 8, "heads": 2}
    torch.manual_seed(0)
    predictor = BoundarySimilarityAttn(**arguments).eval()
    save_predictor(predictor, tmp_path / "p.safetensors", arguments)
    loaded = load_predictor(tmp_path / "p.safetensors")
    options = SMALL | {"chunk_size": 8, "nms_window_size": 3}
    seen = []
    for method in (
        DHSA(**options),
        DHSA(**options | {"predictor": loaded}),
        DHSA(**options | {"predictor": str(tmp_path / "p.safetensors")}),
        DHSA(**options | {"predictor": loaded, "share_boundaries": False}),
    ):
        with regard.apply(model, method):
            seen.append(model(x).logits)
    uniform, by_module, by_path, each_layer = seen
    assert torch.equal(by_module, by_path)
    assert not torch.equal(by_module, uniform)
    assert not torch.equal(by_module, each_layer)


@torch.no_grad()
def test_first_layer_cuts_for_all_and_anew_for_every_prompt() -> None:
    model, x = tiny("llama"), ids(70)
    with regard.apply(model, DHSA(**SMALL)):
        first = model(x).logits
        model(ids(40))
        assert torch.equal(model(x).logits, first)


@torch.no_grad()
def test_works_with_another_mask() -> None:
    """A mask of another method restricts the pairs among the chosen."""
    model, x = tiny("llama"), ids(60)
    with regard.apply(model, SlidingWindow(window_size=10)):
        want = model(x).logits
    with regard.apply(model, [SlidingWindow(window_size=10), DHSA(**SMALL, budget=1.0)]):
        torch.testing.assert_close(model(x).logits, want, atol=1e-4, rtol=1e-4)


def test_channels_of_key_features() -> None:
    key = torch.randn(2, 3, 5, 4)
    assert torch.equal(key_features(key)[1, 7], key[1, 1, :, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget must be a share up to 1 or a whole number of tokens, got 0"),
        ({"budget": 1.5}, "budget"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"local_tokens": 0}, "local_tokens must be at least 1"),
        ({"pooling": "median"}, "pooling must be one of avgpool, avgpool_norm, maxpool"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DHSA(**arguments)


def test_refuses_boundaries_of_another_batch() -> None:
    q, k, v = qkv(20)
    with pytest.raises(ArgumentError, match="a list for each of 2 items, got 1"):
        dhsa_attention(q, k, v, [[0, 20]], DHSAConfig(8, 8, instruction_tokens=4))
