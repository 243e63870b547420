"""The language model: its stacks, streaming, generation and errors."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.models.language import LanguageModel

SMALL = {"vocab_size": 50, "dim": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2}


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(params=["rotary", "learned", "none"])
def decoder(request):
    torch.manual_seed(0)
    return LanguageModel(**SMALL, positions=request.param, max_length=64).eval()


@torch.no_grad()
def test_streaming_gives_the_same_logits(decoder) -> None:
    x = ids(13)
    want = decoder(x)
    state, got = None, []
    for piece in x.split([5, 1, 7], 1):
        logits, state = decoder.stream(piece, state)
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
    assert state.length == 13


@torch.no_grad()
def test_greedy_generation_is_repeated_forwards(decoder) -> None:
    x = ids(5)
    got = decoder.generate(x, 6)
    for _ in range(6):
        x = torch.cat([x, decoder(x)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, x)


def test_sampling_repeats_with_its_generator(decoder) -> None:
    first, again = (
        decoder.generate(ids(4), 8, temperature=1.0, top_k=5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, again)


def test_left_padding_changes_no_continuation() -> None:
    torch.manual_seed(0)
    model = LanguageModel(**SMALL).eval()
    short, long = ids(5, 1), ids(9, 1)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4] = False
    got = model.generate(padded, 6, valid=valid)[:, 9:]
    assert torch.equal(got, torch.cat([model.generate(short, 6)[:, 5:], model.generate(long, 6)[:, 9:]]))


def test_mixed_stacks_repeat_and_take_arguments() -> None:
    model = LanguageModel(
        vocab_size=50, dim=32, depth=4, num_heads=4, mixers=["softmax", ("softmax", {"window_size": 3})]
    )
    assert [block.mixer.window_size for block in model.blocks] == [None, 3, None, 3]


def test_embeddings_are_tied_or_not() -> None:
    tied, untied = LanguageModel(**SMALL), LanguageModel(**SMALL, tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_an_encoder_sees_both_ways_and_classifies_what_is_real() -> None:
    torch.manual_seed(0)
    model = LanguageModel(**SMALL, causal=False, num_classes=3).eval()
    x = ids(8)
    assert model(x).shape == (2, 3)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 6:] = False
    torch.testing.assert_close(model(x, valid)[1:], model(x[1:, :6]))
    with pytest.raises(Unsupported, match="decoder"):
        model.stream(x)


def test_save_and_load(tmp_path) -> None:
    model = LanguageModel(**SMALL, mixers=["softmax", ("softmax", {"window_size": 3})]).eval()
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids(9)), model(ids(9)), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm": "batch"}, "norm: expected one of rms, layer, got 'batch'"),
        ({"positions": "learned"}, "max_length"),
        ({"mixers": ["softmax"] * 3}, "3 of them do not divide the 2 layers"),
        ({"mixers": "softmaxx"}, "unknown system 'softmaxx'"),
        ({"mixers": ("softmax", {"windows": 3})}, "softmax: unknown argument windows; it takes: dim"),
        ({"num_heads": 3}, "3 heads do not divide dim 32"),
    ],
)
def test_bad_configurations_are_named(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        LanguageModel(**{**SMALL, "num_kv_heads": None, **config})


def test_bad_input_is_named() -> None:
    model = LanguageModel(**SMALL, max_length=8)
    with pytest.raises(ArgumentError, match="9 tokens are more than max_length = 8"):
        model(ids(9))
    with pytest.raises(ShapeError, match="ids: expected integers"):
        model(torch.randn(2, 3))
    with pytest.raises(Unsupported):
        LanguageModel(**SMALL, mixers="h2o")
