"""A toy language model that is trained only to produce: six symbols, a sign, and the symbols again, or backwards."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import require
from regard.tasks.paradox import ParadoxItem, select_by_likelihood, shuffled

CHOICES = 4
_SYMBOLS, _LENGTH = 16, 6
_COPY, _REVERSE = _SYMBOLS, _SYMBOLS + 1


def toy(seed: int, steps: Sequence[int], items: int, on_measured: Callable[[int], None]) -> Iterator[list[ParadoxItem]]:
    """Records of the same items, easy and hard, after each of these numbers of training steps."""
    texts, answers = _texts(items, torch.Generator().manual_seed(seed + 1))
    for done, model in enumerate(_train(seed, steps)):
        on_measured(done + 1)
        produced = _produce(model, texts)
        found = []
        for i in range(items):
            context, right = texts[i].tolist(), answers[i].tolist()
            drawn = random.Random(seed * items + i)
            reference, written = _spell(right), _spell(produced[i].tolist())
            for hardness in ("easy", "hard"):
                wrong = _wrong(right, drawn, near=hardness == "hard")
                candidates = shuffled(reference, wrong, seed + i)
                picked = select_by_likelihood(model, None, context, [_read(text) for text in candidates])
                found.append(
                    ParadoxItem(
                        str(i), "copy" if context[-1] == _COPY else "reverse", _spell(context), reference, candidates,
                        "easy" if hardness == "easy" else "hard", seed + i, written, float(written == reference),
                        picked.selected,
                    )
                )  # fmt: skip
        yield found


def _texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contexts (count, 7), and what must follow (count, 6)."""
    symbols = torch.randint(_SYMBOLS, (count, _LENGTH), generator=generator)
    reverse = torch.rand(count, 1, generator=generator) < 0.5
    sign = torch.where(reverse, _REVERSE, _COPY)
    return torch.cat((symbols, sign), 1), torch.where(reverse, symbols.flip(1), symbols)


def _train(seed: int, steps: Sequence[int]) -> Iterator[Any]:
    """The model after each of the numbers of steps; it goes on from there."""
    transformers = require("transformers", "train the toy model")
    config = transformers.LlamaConfig(
        vocab_size=_SYMBOLS + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for step in range(1, max(steps) + 1):
        with torch.enable_grad():
            texts, answers = _texts(64, generator)
            logits = model(torch.cat((texts, answers[:, :-1]), 1)).logits[:, _LENGTH:]
            F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            yield model.eval()
            model.train()


@torch.no_grad()
def _produce(model: Any, texts: Tensor) -> Tensor:
    """The likeliest symbols (count, 6), one after the other."""
    whole = texts
    for _ in range(_LENGTH):
        whole = torch.cat((whole, model(whole).logits[:, -1:, :_SYMBOLS].argmax(-1)), 1)
    return whole[:, texts.shape[1] :]


def _wrong(right: Sequence[int], drawn: random.Random, *, near: bool) -> list[str]:
    """Different strings, none of them the right one: random, or with one symbol changed."""
    found = [list(right)]
    while len(found) < CHOICES:
        text = list(right) if near else drawn.choices(range(_SYMBOLS), k=_LENGTH)
        if near:
            at = drawn.randrange(_LENGTH)
            text[at] = (text[at] + drawn.randrange(1, _SYMBOLS)) % _SYMBOLS
        if text not in found:
            found.append(text)
    return [_spell(text) for text in found[1:]]


def _spell(symbols: Sequence[int]) -> str:
    """Letters for the symbols, = and < for the signs."""
    return "".join("=<"[symbol - _SYMBOLS] if symbol >= _SYMBOLS else chr(ord("a") + symbol) for symbol in symbols)


def _read(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]
