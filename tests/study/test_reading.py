"""Reading and going on, on a model that can only count."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import DynamicCache

from regard.study.reading import Reader
from tests.tiny_models import tiny


class Counter(nn.Module):
    """Its next token is always the last one plus one; the cache remembers what was read."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        cache = past_key_values or []
        cache = [*cache, *input_ids[0].tolist()]
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 50).float(), past_key_values=cache)


def test_goes_on_token_by_token():
    counted = []
    reader = Reader(Counter(), counted.append)
    reading = reader.read([1, 2, 3])
    assert int(reading.logits.argmax()) == 4
    assert reader.greedy(reading, 3) == [4, 5, 6]
    assert [int(logits.argmax()) for logits in reader.follow(reading, [20, 30])] == [7, 21]
    assert reading.cache == [1, 2, 3, 4, 5, 6, 20, 30]
    assert len(reading.seconds) == 6
    assert counted == [3, 1, 1, 1, 1, 1]


def test_recalls_only_what_is_right_to_the_last_token():
    reader = Reader(Counter())
    reading = reader.read([1])
    assert reader.recalls(reading.copy(), [7], [8, 9, 10])
    assert not reader.recalls(reading.copy(), [7], [8, 9, 11])
    assert not reader.recalls(reading.copy(), [7], [9, 10])
    stopped = reading.copy()
    assert not reader.recalls(stopped, [7], [9, 10])
    assert stopped.cache == [1, 7]
    assert reading.cache == [1]


def test_copies_are_independent():
    model = tiny("llama")
    reader = Reader(model)
    with torch.inference_mode():
        reading = reader.read(list(range(3, 20)))
        first, second = (reader.greedy(reading.copy(), 4) for _ in range(2))
    assert first == second
    assert isinstance(reading.cache, DynamicCache)
    assert reading.cache.get_seq_length() == 17
    assert len(reading.seconds) == 1


def test_logits_are_those_of_one_forward():
    model, ids = tiny("qwen3"), list(range(3, 23))
    reader = Reader(model)
    with torch.inference_mode():
        reading = reader.read(ids[:15])
        seen = torch.stack(list(reader.follow(reading, ids[15:])))
        expected = model(torch.tensor([ids])).logits[0, 14:-1]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-4)
