"""A toy language model with a planted sink: two delimiters that draw some heads' attention and are good for nothing.

Six groups of six words. A text holds one word of each group, two delimiters among them, and ends in a question that
names a group; the answer is its word. The model learns this without the plant, which is a constant added to the
delimiters' scores in some heads of every layer.
"""

import random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import require
from regard.methods.language.act import ACT, by_layer, head_gains
from regard.sites import apply

_GROUPS, _WORDS = 6, 6
_DELIMITERS = (3, 6)
_LENGTH = _GROUPS + len(_DELIMITERS) + 2
_PLANTED_HEADS, _PLANTED = (1, 2), 8.0
_HEADS = 4


def toy(seed: int, *, steps: int, layers: int = 3, questions: int = 2000) -> dict[str, Any]:
    """Train, plant, search on some questions, and score others: accuracies and the heads that were found."""
    model = _train(seed, steps, layers)
    search, held_out = (_texts(n, torch.Generator().manual_seed(seed + at)) for at, n in ((1, 256), (2, questions)))

    def accuracy(which: nn.Module, texts: tuple[Tensor, Tensor] = held_out, planted: float = _PLANTED) -> float:
        with torch.no_grad():
            logits = which(texts[0], attention_mask=_bias(len(texts[0]), planted)).logits
        return float((logits[:, -1, :_WORDS].argmax(-1) == texts[1]).float().mean())

    gains = head_gains(model, lambda which: accuracy(which, search), range(layers))
    chosen = [head for head, gain in gains.items() if gain > 0]
    drawn = random.Random(seed)
    others = [drawn.sample(list(gains), len(chosen)) for _ in range(5)]
    found: dict[str, Any] = {"without plant": accuracy(model, planted=0.0), "planted": accuracy(model)}
    for name, sets in (("calibrated", [chosen]), ("random heads", others)):
        scores = []
        for heads in sets:
            with apply(model, ACT(only_heads=by_layer(heads))):
                scores.append(accuracy(model))
        found[name] = fmean(scores)
    return {**found, "chosen": chosen, "planted heads": _PLANTED_HEADS}


def _texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (count, length), beginning with token 0, and answers (count,)."""
    word = torch.randint(_WORDS, (count, _GROUPS), generator=generator)
    order = torch.rand(count, _GROUPS, generator=generator).argsort(1)
    asked = torch.randint(_GROUPS, (count, 1), generator=generator)
    text = torch.zeros(count, _LENGTH, dtype=torch.long)
    places = [place for place in range(1, _LENGTH - 1) if place not in _DELIMITERS]
    text[:, places] = 2 + order * _WORDS + word.gather(1, order)
    text[:, list(_DELIMITERS)] = 1
    text[:, -1:] = 2 + _GROUPS * _WORDS + asked
    return text, word.gather(1, asked)[:, 0]


def _bias(count: int, planted: float) -> Tensor:
    """The causal mask as a bias (count, heads, length, length), with the plant."""
    seen = torch.ones(_LENGTH, _LENGTH).tril()
    bias = torch.zeros(_HEADS, _LENGTH, _LENGTH).masked_fill(seen == 0, torch.finfo(torch.float32).min)
    for head in _PLANTED_HEADS:
        bias[head, :, list(_DELIMITERS)] += planted * seen[:, list(_DELIMITERS)]
    return bias.expand(count, -1, -1, -1)


def _train(seed: int, steps: int, layers: int) -> Any:
    transformers = require("transformers", "train the toy model")
    config = transformers.LlamaConfig(
        vocab_size=2 + _GROUPS * _WORDS + _GROUPS,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            text, answer = _texts(128, generator)
            F.cross_entropy(model(text).logits[:, -1, :_WORDS], answer).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()
