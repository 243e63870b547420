"""`regard.record` on SmolLM2: time and extra memory beside a plain forward, and what holding all weights would need;
before that, how far its statistics are from those of the weights that eager attention gives.

python benchmarks/record.py [--lengths 1024 4096 8192]
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import regard
from race import machine
from regard.probes import recorded_averages
from regard.study.memory import PeakMemory
from regard.study.models import load
from regard.tasks.text import english, tokenize


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of processor time, and peak extra bytes."""
    with PeakMemory(torch.device("cpu")) as memory:
        start = time.process_time()
        run()
        seconds = time.process_time() - start
    return seconds, memory.bytes


def difference(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """The largest difference of each statistic from that of eager attention's weights."""
    found = regard.record(model, ids, queries=[-1])
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    largest: dict[str, float] = {}
    received = recorded_averages(found)
    for (i, layer), weights in zip(found.layers.items(), attentions, strict=True):
        expected = {
            "received": (received[i], weights.sum(2) / torch.arange(ids.shape[1], 0, -1)),
            "entropy": (layer.entropy, torch.special.entr(weights).sum(-1)),
            "peak": (layer.peak, weights.amax(-1)),
            "rows": (layer.rows, weights[:, :, -1:]),
        }
        for name, (a, b) in expected.items():
            largest[name] = max(largest.get(name, 0.0), float((a - b).abs().max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    args = parser.parse_args()
    model, tokenizer = load("smollm2")
    config = model.config
    apart = difference(model, torch.tensor([tokenize(tokenizer, english(), 512)]))
    print("512 tokens, from eager attention: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    table = Table("tokens", "forward s", "record s", "forward extra MB", "record extra MB", "all weights GB")
    for n in args.lengths:
        ids = torch.tensor([tokenize(tokenizer, english(), n)])
        with torch.no_grad():
            plain = measured(lambda ids=ids: model.model(ids, use_cache=False))
        recorded = measured(lambda ids=ids: regard.record(model.model, {"input_ids": ids, "use_cache": False}))
        weights = 4 * config.num_hidden_layers * config.num_attention_heads * n * n
        cells = [f"{x:.1f}" for x in (plain[0], recorded[0])] + [f"{x / 2**20:.0f}" for x in (plain[1], recorded[1])]
        table.add_row(f"{n:,}", *cells, f"{weights / 2**30:.1f}")
    console = Console(width=100)
    console.print(machine())
    console.print(table)


if __name__ == "__main__":
    main()
