"""The sliding-window baseline against the model's own eager attention under the window as a mask."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import regard
from regard.errors import ArgumentError
from regard.methods.language.sliding_window import SlidingWindow
from tests.tiny_models import NAMES, tiny


def ids(n: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [1, 9, 100])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_query_sees_the_last_tokens(name: str, window: int) -> None:
    n, model, x = 40, tiny(name), ids(40)
    if name == "gemma3":
        model = tiny(name, layer_types=["full_attention"] * 3)
    token = torch.arange(n)
    distance = token[:, None] - token
    table = (distance >= 0) & (distance < window)
    model.set_attn_implementation("eager")
    bias = torch.zeros(n, n).masked_fill(~table, torch.finfo(torch.float32).min)[None, None].expand(2, -1, -1, -1)
    want = model(x, attention_mask=bias).logits
    with regard.apply(model, SlidingWindow(window_size=window)):
        got = model(x).logits
        cache = DynamicCache(config=model.config)
        pieces = [model(x[:, a:b], past_key_values=cache).logits for a, b in ((0, 20), (20, 30), (30, 31), (31, 40))]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(pieces, dim=1), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_is_the_window_of_models_that_have_one() -> None:
    """Mistral with a window of its own equals Mistral without, under the method."""
    x = ids(50)
    own = tiny("mistral-sliding")(x).logits
    with regard.apply(model := tiny("mistral"), SlidingWindow(window_size=12)):
        torch.testing.assert_close(model(x).logits, own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding() -> None:
    model, x = tiny("llama"), ids(40)
    padding = torch.ones_like(x)
    padding[0, :15] = 0
    with regard.apply(model, SlidingWindow(window_size=7)):
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        both = model(x, attention_mask=padding, position_ids=positions).logits
        torch.testing.assert_close(both[:1, 15:], model(x[:1, 15:]).logits, atol=1e-5, rtol=1e-5)


def test_refuses() -> None:
    with pytest.raises(ArgumentError, match="window_size must be at least 1, got 0"):
        SlidingWindow(window_size=0)
