"""Do chunks that follow the content help DHSA? Trains a boundary predictor and compares it with equal chunks.

    python benchmarks/dhsa_boundaries.py [--train 24] [--held-out 4] [--length 1536] [--epochs 8] [--save FILE]

The predictor learns on the first half of the English text that ships with Python, from the attention of SmolLM2's first
layer. On texts of the other half the script prints the F1 of its boundaries against those the attention labels, and the
loss of SmolLM2 on each text when it reads the text sparsely at a quarter of the keys: with equal chunks, with predicted
ones, and with the labelled ones themselves, which no predictor can do more than reproduce.
"""

import argparse
import platform
import time
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.methods.language.dhsa import (
    DHSA,
    BoundaryPredictor,
    BoundarySimilarityAttn,
    examples,
    save_predictor,
    select_boundaries,
    train_predictor,
    uniform_boundaries,
)
from regard.methods.language.dhsa.train import boundary_f1
from regard.methods.language.sliding_window import SlidingWindow
from regard.sites import Method
from regard.study import models

WINDOW, NMS, CHUNK, BUDGET = 4, 8, 16, 0.25
SKIPPED = 256  # first tokens of a text, which are read densely whatever the method


class Known(BoundaryPredictor):
    """A "predictor" that returns scores it was given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__(1, WINDOW, 1, 1, 1e-6)
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.clone()


@torch.no_grad()
def loss(model: Any, text: Tensor, methods: list[Method], instruction: int = 64) -> float:
    """Mean loss over the sparsely read part of a text."""
    with regard.apply(model, methods):
        logits = model(text, use_cache=False).logits[0]
    read = slice(SKIPPED, text.shape[1] - instruction - 1)
    return F.cross_entropy(logits[read].float(), text[0, 1:][read]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=24, help="texts to learn from")
    parser.add_argument("--held-out", type=int, default=4, help="texts to compare on")
    parser.add_argument("--length", type=int, default=1536, help="tokens per text")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--save", metavar="FILE", help="write the predictor here")
    args = parser.parse_args()
    console = Console()
    console.print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    model, tokenizer = models.load("smollm2")
    tokens = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids
    half = tokens.shape[1] // 2

    def texts(first: int, last: int, count: int) -> list[Tensor]:
        starts = torch.linspace(first, last - args.length, count).long().tolist()
        return [tokens[:, start : start + args.length] for start in starts]

    start = time.perf_counter()
    data = examples(model, texts(0, half, args.train), WINDOW, layers=[0])
    arguments = {"channel_in": data[0].features.shape[1], "window_size": WINDOW, "d_h": 64, "heads": 4}
    torch.manual_seed(0)
    predictor = train_predictor(BoundarySimilarityAttn(**arguments), data, epochs=args.epochs, lr=args.lr)
    console.print(f"trained on {args.train} texts of {args.length} tokens in {time.perf_counter() - start:.0f} s")
    if args.save:
        save_predictor(predictor, args.save, arguments)

    held_out = texts(half, tokens.shape[1], args.held_out)
    labelled = examples(model, held_out, WINDOW, layers=[0])
    f1: dict[str, list[float]] = {"equal chunks": [], "predicted": []}
    losses: dict[str, list[float]] = {}
    window = SlidingWindow(window_size=int(BUDGET * args.length))
    for text, example in zip(held_out, labelled, strict=True):
        true = select_boundaries(example.ratio[0], args.length // CHUNK, 1.1, NMS)
        scores = predictor(example.features)[0].masked_fill(example.ratio[0] == 0, -100.0)
        f1["predicted"].append(boundary_f1(select_boundaries(scores, len(true) - 2, None, NMS), true))
        f1["equal chunks"].append(boundary_f1(uniform_boundaries(args.length, args.length // (len(true) - 1)), true))
        for name, methods in {
            "dense": [],
            "sliding window": [window],
            "equal chunks": [DHSA(budget=BUDGET, chunk_size=CHUNK)],
            "predicted": [DHSA(budget=BUDGET, chunk_size=CHUNK, predictor=predictor)],
            "labelled": [DHSA(budget=BUDGET, chunk_size=CHUNK, predictor=Known(example.ratio))],
        }.items():
            losses.setdefault(name, []).append(loss(model, text, methods))

    table = Table("chunks", "boundary F1", "loss", "above dense")
    for name, values in losses.items():
        agreement = f"{mean(f1[name]):.2f}" if name in f1 else ""
        table.add_row(name, agreement, f"{mean(values):.4f}", f"{mean(values) - mean(losses['dense']):+.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
