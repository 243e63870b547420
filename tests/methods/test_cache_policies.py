"""What every cache policy keeps to, on every family: full budget is dense, rows are independent, generation works."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import regard
from regard.cache import nbytes
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.h2o import H2O
from regard.methods.language.streaming_llm import StreamingLLM
from regard.methods.language.xkv import XKV
from tests.tiny_models import NAMES, tiny

#: hold everything, with their machinery running wherever they have any
FULL = [
    StreamingLLM(start_size=4, recent_size=500),
    StreamingLLM(budget=1),
    H2O(hh_size=500, recent_size=500),
    H2O(hh_size=500, recent_size=500, positions="slot", normalise=True),
    H2O(budget=1),
    XKV(rank=500),
    XKV(rank_k=1.0, rank_v=1.0, group_size=2, store="dense"),
]
#: drop or compress a good part of twenty tokens
SMALL = [
    StreamingLLM(start_size=2, recent_size=6),
    H2O(hh_size=3, recent_size=5),
    H2O(hh_size=3, recent_size=5, positions="slot"),
    H2O(hh_size=3, recent_size=5, normalise=True),
    XKV(rank=5, group_size=2),
    XKV(rank=5, group_size=2, sink_size=0),
    XKV(rank=5, group_size=2, store="dense"),
]
GENERATION = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beam": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

every_model = pytest.mark.parametrize("name", NAMES)
full = pytest.mark.parametrize("method", FULL, ids=str)
small = pytest.mark.parametrize("method", SMALL, ids=str)


def batch(rows=2, length=20, pad=7, seed=1):
    """Token ids whose first row has `pad` padding tokens on its left, and the attention mask."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return ids, mask


def feed(model, ids, mask, cuts):
    """Logits of the tokens fed in pieces that end at `cuts`, and the cache; positions count real tokens."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, out = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            piece = ids[:, start:stop]
            call = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            out.append(model(piece, **call, past_key_values=cache).logits)
    return torch.cat(out, dim=1), cache


@every_model
@full
def test_full_budget_is_dense(name, method):
    """A padded batch, the prompt in two pieces, then single tokens."""
    model, (ids, mask) = tiny(name), batch()
    expected, _ = feed(model, ids, mask, [])
    with regard.apply(model, method):
        got, _ = feed(model, ids, mask, [9, 15, 16, 17, 18, 19])
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("method", [FULL[0], FULL[2], FULL[6]], ids=str)
def test_full_budget_is_dense_on_trained_weights(method, smollm2):
    model, tokenizer = smollm2
    text = "The first tokens of a text receive much attention, whatever they say, and every later one sees them. " * 6
    ids = tokenizer(text, return_tensors="pt").input_ids
    cuts = list(range(ids.shape[1] - 4, ids.shape[1]))
    expected, _ = feed(model, ids, torch.ones_like(ids), cuts)
    with regard.apply(model, method):
        got, _ = feed(model, ids, torch.ones_like(ids), cuts)
    torch.testing.assert_close(got, expected, **CLOSE)


@full
def test_bfloat16_costs_no_more_than_it_does_anyway(method):
    (ids, mask), cuts = batch(), [15, 16, 17, 18, 19]
    expected, _ = feed(tiny("llama"), ids, mask, cuts)
    model = tiny("llama").bfloat16()
    dense, _ = feed(model, ids, mask, cuts)
    with regard.apply(model, method):
        got, _ = feed(model, ids, mask, cuts)
    assert got.dtype == torch.bfloat16
    error, anyway = ((x - expected)[mask.bool()].abs().mean() for x in (got, dense))
    assert error < 1.5 * anyway


@every_model
@pytest.mark.parametrize("how", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("method", [FULL[0], FULL[2], FULL[5]], ids=str)
def test_full_budget_generates_what_dense_does(name, how, method):
    model, (ids, mask) = tiny(name), batch()

    def generate():
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, **how)

    expected = generate()
    with regard.apply(model, method):
        assert torch.equal(generate(), expected)


@every_model
@pytest.mark.parametrize("how", GENERATION.values(), ids=GENERATION)
@small
def test_generation_works(name, how, method):
    model, (ids, mask) = tiny(name), batch()
    torch.manual_seed(3)
    with regard.apply(model, method):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, return_dict_in_generate=True, **how
        )
    assert out.sequences.shape == (2 * how.get("num_return_sequences", 1), 32)
    assert out.past_key_values.get_seq_length() == 31
    layer = out.past_key_values.layers[1]
    if not isinstance(method, XKV):
        assert layer.keys.shape[2] == 8


@pytest.mark.parametrize(
    ("name", "hole"),
    # Gemma 3's own sliding windows count padding, so there a hole does make a difference
    [(name, hole) for name in NAMES for hole in (0, 3) if not (name == "gemma3" and hole)],
)
@small
def test_rows_of_a_batch_do_not_know_of_each_other(name, method, hole):
    """A padded row gives what it gives alone and without padding, with whatever was dropped or compressed.

    Padding may also stand in the middle, as it does where rows get a second prompt.
    """
    model, (ids, mask) = tiny(name), batch(length=30, pad=11)
    mask[0, 22 : 22 + hole] = 0
    cuts = [20, 21, 22, 27, 28, 29]
    real = mask[0].bool()
    with regard.apply(model, method):
        together, cache = feed(model, ids, mask, cuts)
        alone, cache_alone = feed(model, ids[:1, real], mask[:1, real], [int(real[:cut].sum()) for cut in cuts])
    torch.testing.assert_close(together[:1, real], alone, **CLOSE)
    layer, layer_alone = cache.layers[1], cache_alone.layers[1]
    if not isinstance(method, XKV):
        torch.testing.assert_close(layer.values[:1], layer_alone.values, **CLOSE)
        assert torch.equal(layer.slots.positions[:1], layer_alone.slots.positions)


def test_heads_may_count_slots_differently():
    """Rotation to slots where padding stands elsewhere in each key-value head, shared by pairs of query heads."""
    model, seen = tiny("llama"), []

    class Rotated(StreamingLLM):
        def qkv(self, call):
            call.layer.slots.valid = torch.tensor([[[True] * 4, [False, True, False, True]]])
            raw = call.site.rotary.unrotate(call.query, call.step.positions)
            super().qkv(call)
            at = call.site.rotary.rotate
            key_slots = torch.tensor([[[0, 1, 2, 3], [0, 0, 0, 1]]])
            torch.testing.assert_close(call.key, at(call.layer.keys, key_slots), **CLOSE)
            torch.testing.assert_close(call.query, at(raw, key_slots.repeat_interleave(2, dim=1)), **CLOSE)
            seen.append(call.site.index)

    with regard.apply(model, Rotated()), torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]))
    assert seen == [0, 1, 2]


@small
def test_a_row_shorter_than_the_budget_keeps_all_it_has(method):
    model, (ids, mask) = tiny("llama"), batch(length=20, pad=16)
    dense, _ = feed(model, ids[:1, 16:], mask[:1, 16:], [])
    with regard.apply(model, method):
        got, _ = feed(model, ids, mask, [17, 18, 19])
    if not isinstance(method, XKV):
        torch.testing.assert_close(got[:1, 16:], dense, **CLOSE)
    assert torch.isfinite(got).all()


@small
def test_the_batch_can_be_reordered_repeated_and_chosen_from(method):
    model, (ids, mask) = tiny("llama"), batch(rows=3)
    after, more = torch.tensor([[5], [6], [7]]), torch.ones(3, 1, dtype=torch.long)
    mask = torch.cat((mask, more), dim=1)
    with regard.apply(model, method), torch.no_grad():
        _, cache = feed(model, ids, mask[:, :-1], [16, 17, 18, 19])

        def step(change, rows):
            changed = copy.deepcopy(cache)
            change(changed)
            return model(after[rows], attention_mask=mask[rows], past_key_values=changed).logits

        expected = step(lambda _: None, torch.arange(3))
        order = torch.tensor([2, 0, 2])
        torch.testing.assert_close(step(lambda c: c.reorder_cache(order), order), expected[order], **CLOSE)
        twice = torch.tensor([0, 0, 1, 1, 2, 2])
        torch.testing.assert_close(step(lambda c: c.batch_repeat_interleave(2), twice), expected[twice], **CLOSE)
        some = torch.tensor([2, 1])
        torch.testing.assert_close(step(lambda c: c.batch_select_indices(some), some), expected[some], **CLOSE)


@small
def test_copies_go_their_own_way(method):
    model, (ids, mask) = tiny("llama"), batch()
    with regard.apply(model, method), torch.no_grad():
        _, cache = feed(model, ids, mask, [18, 19])
        twin = copy.deepcopy(cache)
        assert nbytes(twin) == nbytes(cache)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        model(torch.full((2, 1), 50), attention_mask=mask, past_key_values=twin)
        first, second = (
            model(torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=c).logits
            for c in (cache, feed(model, ids, mask[:, :-1], [18, 19])[1])
        )
        assert torch.equal(first, second)


@small
def test_a_cache_can_be_emptied_and_used_again(method):
    model, (ids, mask) = tiny("llama"), batch()
    with regard.apply(model, method), torch.no_grad():
        expected, cache = feed(model, ids, mask, [18, 19])
        cache.reset()
        assert nbytes(cache) == 0
        out = model(ids[:, :18], attention_mask=mask[:, :18], past_key_values=cache).logits
    torch.testing.assert_close(out[mask[:, :18].bool()], expected[:, :18][mask[:, :18].bool()], **CLOSE)


@small
def test_layers_that_slide_keep_their_window(method):
    model, (ids, mask) = tiny("gemma3"), batch(length=30)
    with regard.apply(model, method):
        _, cache = feed(model, ids, mask, [28, 29])
    assert [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers] == [True, False, True]
    assert [cache.layers[i].keys.shape[2] for i in (0, 2)] == [11, 11]
    with (
        pytest.raises(Unsupported, match="acts on layers with full context; this model has none"),
        regard.apply(tiny("mistral-sliding"), method),
    ):
        pass


@small
def test_the_model_is_left_as_it_was(method):
    model, (ids, mask) = tiny("llama"), batch()
    before, _ = feed(model, ids, mask, [18])
    with regard.apply(model, method):
        feed(model, ids, mask, [18])
    after, cache = feed(model, ids, mask, [18])
    assert torch.equal(before, after)
    assert cache.layers[0].keys.shape[2] == 20


class TestRefused:
    """Caches a policy cannot work with, each with one clear message."""

    method = StreamingLLM(start_size=2, recent_size=6)

    def test_a_cache_filled_without_it(self):
        model, (ids, mask) = tiny("llama"), batch()
        _, cache = feed(model, ids, mask, [])
        with (
            regard.apply(model, self.method),
            pytest.raises(ArgumentError, match="filled without streaming-llm"),
        ):
            model(ids[:, :1], past_key_values=cache)

    def test_a_cache_of_another_policy(self):
        model, (ids, mask) = tiny("llama"), batch()
        with regard.apply(model, H2O()):
            _, cache = feed(model, ids, mask, [])
        with (
            regard.apply(model, self.method),
            pytest.raises(ArgumentError, match="filled without streaming-llm"),
        ):
            model(ids[:, :1], past_key_values=cache)

    def test_its_cache_outside_apply(self):
        model, (ids, mask) = tiny("llama"), batch()
        with regard.apply(model, self.method):
            _, cache = feed(model, ids, mask, [])
        with pytest.raises(ArgumentError, match="works inside `with regard"):
            model(ids[:, :1], past_key_values=cache)

    def test_offloading(self):
        model, (ids, _) = tiny("llama"), batch()
        cache = DynamicCache(config=model.config, offloading=True)
        with (
            regard.apply(model, self.method),
            pytest.raises(Unsupported, match="does not support a cache that offloads"),
        ):
            model(ids, past_key_values=cache)

    def test_masks_by_position_once_keys_are_dropped(self):
        model, (ids, mask) = tiny("llama"), batch()
        with regard.apply(model, self.method):
            _, cache = feed(model, ids, mask, [])
            with pytest.raises(Unsupported, match="four-dimensional attention_mask counts keys by position"):
                model(ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 21), past_key_values=cache)

    def test_rolling_back(self):
        model, (ids, mask) = tiny("llama"), batch()
        with regard.apply(model, self.method):
            _, cache = feed(model, ids, mask, [])
        with pytest.raises(ArgumentError, match="cannot be rolled back"):
            cache.crop(-1)
