"""Sequence mechanisms against softmax attention and against other libraries' modules, side by side.

    python benchmarks/mechanisms.py [--mechanisms mala titans] [--lengths 1024 4096] [--peers]

For every mechanism and length: the time of a layer over that of softmax attention (dense SDPA with the same width and
heads), forward and forward plus backward, and of decoding one token after so many; then the log-log slope of its time
over the lengths, and the bytes of its streaming state. Softmax and the mechanism take turns. A length whose softmax
layer would take more than ``--limit`` seconds is left to the mechanisms that grow linearly; their ratio is not shown.

With ``--peers`` the layers of x-transformers, local-attention, agent-attention-pytorch and titans-pytorch run against
regard's layer of the same mechanism on the same input, where they are installed (`pip install` them beside regard).
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from race import Race, machine
from regard import catalog
from regard.errors import Unsupported
from regard.mechanisms import Mechanism, create, state_bytes
from regard.mechanisms.registry import create_mixer, module_class

DIM, HEADS = 256, 4
LENGTHS = (1024, 4096, 16384, 65536)
#: what a mechanism is measured with beside its defaults: a budget that a model of this size would have
CONFIG: dict[str, dict[str, Any]] = {
    "core-context-attention": {"group_size": 16, "local_size": 512},
    "dynamic-mask-attention": {"window_size": 512},
    "hyper-attention": {"block_size": 256, "sample_size": 256, "min_seq_len": 1024},
}


def causal_mechanisms() -> list[str]:
    working = catalog.systems(kind="mechanism", status="works")
    classes = {s.slug: s.load() for s in working}
    return [
        slug
        for slug, cls in classes.items()
        if isinstance(cls, type) and issubclass(cls, Mechanism) and "causal-self" in cls.patterns
    ]


def layer(slug: str, length: int) -> Mechanism:
    offered = {"dim": DIM, "num_heads": HEADS, "max_length": length + 1, "layer_idx": 1, "num_layers": 4}
    return create_mixer(slug, causal=True, defaults=offered, **CONFIG.get(slug, {})).eval()


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
    if type(module).state is None:
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


def measure(slug: str, lengths: list[int], race: Race, limit: float) -> Iterator[list[str]]:
    times: dict[int, float] = {}
    dense_second = 0.0
    for n in lengths:
        x = torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(0))
        module, dense = layer(slug, n), create("softmax", dim=DIM, num_heads=HEADS).eval()
        assert isinstance(dense, Mechanism)
        runs_dense = dense_second * 16 < limit
        if not runs_dense and times and times[max(times)] * 16 > limit:
            break
        state = prefill(module, x)
        own = uses(module, x, state)
        contest = {f"{slug} {use}": function for use, function in own.items()}
        if runs_dense:
            theirs = uses(dense, x, prefill(dense, x))
            contest |= {f"softmax {use}": function for use, function in theirs.items()}
        t = race(contest)
        times[n] = t[f"{slug} forward"]
        dense_second = t.get("softmax both", dense_second)
        ratios = [
            f"{t[f'{slug} {use}'] / t[f'softmax {use}']:.2f}" if f"softmax {use}" in t and f"{slug} {use}" in t else "-"
            for use in ("forward", "both", "decode")
        ]
        held = "-" if state is None else f"{state_bytes(state):,}"
        yield [slug if len(times) == 1 else "", f"{n:,}", f"{times[n] * 1e3:.1f}", *ratios, held, ""]
    if len(times) > 1:
        last = list(times)[-2:]
        both_slopes = slope(list(times), list(times.values())), slope(last, [times[n] for n in last])
        yield ["", "", "", "", "", "", "", "{:.2f} ({:.2f})".format(*both_slopes)]


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

        side = math.isqrt(n)
        if side * side == n:
            own = create(
                "agent-attention", dim=DIM, num_heads=HEADS, num_agents=64, grid=(side, side), agent_bias=False
            )
            theirs = AgentSelfAttention(
                dim=DIM, num_agent_tokens=64, dim_head=DIM // HEADS, heads=HEADS, talking_heads=False, gate=False
            )
            yield "agent-attention-pytorch", "agent-attention", own, theirs
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
    parser.add_argument("--mechanisms", nargs="+", help="catalogue names; all that are causal by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that one forward and backward may take")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other work runs beside")
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
    for slug in track(args.mechanisms or causal_mechanisms(), console=Console(stderr=True), transient=True):
        module_class(slug)
        try:
            for row in measure(slug, args.lengths, race, args.limit):
                table.add_row(*row)
        except Unsupported as error:
            table.add_row(slug, "", "", f"refused: {error}")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
