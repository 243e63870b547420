"""Sequence mechanisms against softmax attention and against other libraries' modules, side by side.

    python benchmarks/mechanisms.py [--mechanisms mala titans] [--lengths 1024 4096] [--peers]

For every mechanism and length: the time of a layer over that of softmax attention (dense SDPA with the same width and
heads, causal or not as the mechanism is), forward and forward plus backward, and of decoding one token after so many;
the bytes of its streaming state; and the log-log slope of its forward time over all lengths and over the last two. All
of a length take turns in one race. What would take longer than ``--limit`` seconds, judged by its growth so far, is
left out at that length, softmax too: then there is no ratio.

With ``--peers`` the layers of x-transformers, local-attention, agent-attention-pytorch and titans-pytorch run against
regard's layer of the same mechanism on the same input, where they are installed (`pip install` them beside regard).
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from race import Race, machine
from regard import catalog
from regard.errors import ArgumentError, Unsupported
from regard.mechanisms import Mechanism, create, state_bytes
from regard.mechanisms.registry import create_mixer, module_class
from regard.study.sequence import all_mixers, is_causal

DIM, HEADS = 256, 4
LENGTHS = (1024, 4096, 8192, 16384, 65536)
NONCAUSAL = " (noncausal)"
#: what a mechanism is measured with beside its defaults: a budget that a model of this size would have
CONFIG: dict[str, dict[str, Any]] = {
    "core-context-attention": {"group_size": 16, "local_size": 512},
    "dynamic-mask-attention": {"window_size": 512},
    "hyper-attention": {"block_size": 256, "sample_size": 256, "min_seq_len": 1024},
    "landmark-attention": {"block_size": 63},
    "sink-lora": {"group_size": 1024, "always": True},  # else only in training
    "titans": {"chunk_size": 64},
}


def layer(name: str, length: int) -> Mechanism:
    offered = {"dim": DIM, "num_heads": HEADS, "max_length": length + 1, "layer_idx": 1, "num_layers": 4}
    causal = is_causal(name.removesuffix(NONCAUSAL)) and not name.endswith(NONCAUSAL)
    return create_mixer(name.removesuffix(NONCAUSAL), causal=causal, defaults=offered, **CONFIG.get(name, {})).eval()


def baseline(name: str) -> str:
    """Softmax, causal or not as the mechanism is."""
    return "softmax" if is_causal(name.removesuffix(NONCAUSAL)) else "softmax" + NONCAUSAL


def uses(module: nn.Module, x: Tensor, state: Any) -> dict[str, Callable[[], object]]:
    """Forward, forward plus backward, and decoding one token."""
    grad = torch.randn_like(x)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    def both() -> None:
        y = module(x)
        torch.autograd.grad(y, parameters, grad, allow_unused=True)

    def decode() -> object:
        with torch.no_grad():
            return module.stream(x[:, -1:], state)

    return {"forward": forward, "both": both} | ({} if state is None else {"decode": decode})


def prefill(module: Mechanism, x: Tensor) -> Any:
    if not module.causal or type(module).state is None:
        return None
    state = None
    with torch.no_grad():
        for piece in x.split(1024, dim=1):
            _, state = module.stream(piece, state)
    return state


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Of the least-squares line through log time over log length."""
    x = torch.tensor([math.log(n) for n in lengths])
    y = torch.tensor([math.log(t) for t in seconds])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@dataclass
class Track:
    """One mechanism's times by length, and bytes of state."""

    forward: dict[int, float] = field(default_factory=dict)
    both: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)
    state: dict[int, int] = field(default_factory=dict)
    refused: str = ""

    def expected(self, n: int) -> float:
        """Seconds of forward plus backward at the next length, from the growth between the last two."""
        if not self.both:
            return 0.0
        known = list(self.both)
        power = slope(known[-2:], [self.both[m] for m in known[-2:]]) if len(known) > 1 else 2.0
        return self.both[known[-1]] * (n / known[-1]) ** max(1.0, power)


def measure(names: list[str], lengths: list[int], race: Race, limit: float) -> dict[str, Track]:
    tracks = {name: Track() for name in names}
    for n in lengths:
        x = torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(0))
        contest: dict[str, Callable[[], object]] = {}
        for name, track in tracks.items():
            if track.refused or (track.both and list(track.both)[-1] != lengths[lengths.index(n) - 1]):
                continue  # what was left out at one length is at all longer ones
            if track.expected(n) > limit:
                continue
            try:
                module = layer(name, n)
                state = prefill(module, x)
                own = uses(module, x, state)
                own["forward"]()
            except (Unsupported, ArgumentError) as error:
                track.refused = str(error)
                continue
            if state is not None:
                track.state[n] = state_bytes(state)
            contest |= {f"{name} {use}": function for use, function in own.items()}
        for key, seconds in race(contest).items():
            name, _, use = key.rpartition(" ")
            getattr(tracks[name], use)[n] = seconds
    return tracks


def rows(name: str, track: Track, dense: Track) -> Iterator[list[str]]:
    if track.refused:
        yield [name, "", "", f"refused: {track.refused}"]
        return
    lengths = list(track.forward)
    for n in lengths:
        pairs = ((track.forward, dense.forward), (track.both, dense.both), (track.decode, dense.decode))
        ratios = [f"{own[n] / theirs[n]:.2f}" if n in own and n in theirs else "-" for own, theirs in pairs]
        held = f"{track.state[n]:,}" if n in track.state else "-"
        growth = ""
        if n == lengths[-1] and len(lengths) > 1:
            steep = [slope(part, [track.forward[m] for m in part]) for part in (lengths, lengths[-2:])]
            growth = "{:.2f} ({:.2f})".format(*steep)
        yield [name if n == lengths[0] else "", f"{n:,}", f"{track.forward[n] * 1e3:.1f}", *ratios, held, growth]


# ---- peers ---------------------------------------------------------------------------------------------------------


def peers(n: int) -> Iterator[tuple[str, str, nn.Module, nn.Module]]:
    """(package, mechanism, regard's layer, the peer's layer), on (1, n, DIM), causal where the mechanism can be."""
    if find_spec("x_transformers"):
        from x_transformers.x_transformers import Attention

        yield (
            "x-transformers",
            "softmax",
            create("softmax", dim=DIM, num_heads=HEADS),
            Attention(dim=DIM, heads=HEADS, dim_head=DIM // HEADS, causal=True, flash=True),
        )
    if find_spec("local_attention"):
        from local_attention.transformer import LocalMHA

        yield (
            "local-attention",
            "sliding window 256",
            create("softmax", dim=DIM, num_heads=HEADS, window_size=256),
            LocalMHA(
                dim=DIM, heads=HEADS, dim_head=DIM // HEADS, window_size=256, causal=True, exact_windowsize=True,
                use_rotary_pos_emb=False,
            ),
        )  # fmt: skip
    if find_spec("agent_attention_pytorch") and "agent-attention" in catalog.names(status="works"):
        from agent_attention_pytorch import AgentSelfAttention

        yield (
            "agent-attention-pytorch",
            "agent-attention",
            create("agent-attention", dim=DIM, num_heads=HEADS, num_agents=64, kernel_size=0, bias=False),
            AgentSelfAttention(
                dim=DIM, num_agent_tokens=64, dim_head=DIM // HEADS, heads=HEADS, talking_heads=False, gate=False
            ),
        )
    if find_spec("titans_pytorch") and "titans" in catalog.names(status="works"):
        from titans_pytorch import MemoryMLP, NeuralMemory

        yield (
            "titans-pytorch",
            "titans",
            create("titans", dim=DIM, chunk_size=64),
            NeuralMemory(dim=DIM, chunk_size=64, model=MemoryMLP(DIM, depth=2, expansion_factor=2.0)),
        )


def peer_rows(lengths: list[int], race: Race) -> Iterator[list[str]]:
    for n in lengths:
        for package, mechanism, own, theirs in peers(n):
            x = torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(0))
            t = race(
                {
                    f"{who} {use}": function
                    for who, module in (("own", own.eval()), ("theirs", _First(theirs.eval())))
                    for use, function in uses(module, x, None).items()
                }
            )
            ratios = [f"{t[f'own {use}'] / t[f'theirs {use}']:.2f}" for use in ("forward", "both")]
            yield [package, mechanism, f"{n:,}", *ratios]


class _First(nn.Module):
    """The first of the outputs; some peers return their state too."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y[0] if isinstance(y, tuple) else y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="+", help="catalogue names; by default all for sequences of any length")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that one forward and backward may take")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other work runs beside")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--peers", action="store_true", help="compare with other libraries instead of with softmax")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    race = Race(args.runs, time.process_time if args.cpu_time else time.perf_counter)
    console = Console(width=100)
    clock = "processor" if args.cpu_time else "wall"
    console.print(f"{machine()}; float32, batch 1, width {DIM}, {HEADS} heads; {clock} time, median of {args.runs}")
    if args.peers:
        table = Table(title="regard's time over the peer's", title_justify="left")
        for column in ("package", "mechanism", "N", "forward", "fwd + bwd"):
            table.add_column(column, justify="left" if column in ("package", "mechanism") else "right")
        for row in peer_rows(args.lengths, race):
            table.add_row(*row)
        console.print(table)
        return
    table = Table(title="time over that of softmax attention", title_justify="left")
    for column in ("mechanism", "N", "ms", "forward", "fwd + bwd", "decode", "state bytes", "slope (last)"):
        table.add_column(column, justify="left" if column == "mechanism" else "right")
    names = args.mechanisms or [name for name in all_mixers() if name != "softmax"]
    for name in names:
        module_class(name)
    dense = list(dict.fromkeys(baseline(name) for name in names))
    with console.status("racing"):
        tracks = measure([*dense, *names], args.lengths, race, args.limit)
    for name in [*dense, *names]:
        for row in rows(name, tracks[name], tracks[baseline(name)]):
            table.add_row(*row)
            if args.markdown:
                print("| " + " | ".join(row) + " |")
        table.add_section()
    if not args.markdown:
        console.print(table)


if __name__ == "__main__":
    main()
