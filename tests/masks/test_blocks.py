"""The block structure: its views, its exactness, and what a million tokens cost."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from regard import masks
from regard.errors import Unsupported
from regard.masks import ALL, NONE, SOME, Mask

MILLION = 1 << 20


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors made by ``work`` took at one time, counted from torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work()  # held, so that it counts
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes, "the profiler reported no allocations"
    del result
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def packed_lengths() -> list[int]:
    lengths = torch.randint(64, 8192, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    while sum(lengths) > MILLION:
        lengths.pop()
    return [*lengths, MILLION - sum(lengths)]


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.sliding_window(4096),
        masks.causal() & (masks.sliding_window(4096) | masks.sinks(64)),
        masks.power(),
        masks.causal() & masks.power(256, 5, 1),
        masks.documents(packed_lengths()),
        masks.causal() & masks.documents(packed_lengths()),
        masks.strided(128),
        masks.causal() & (masks.strided(128) | masks.sliding_window(512)),
        masks.dilated(512, 16),
        masks.blockwise_causal(4096),
        masks.prefix(5000),
        masks.neighborhood((MILLION,), 4097, dilation=4),
        masks.neighborhood((1024, 1024), (17, 33)),
        masks.neighborhood((64, 128, 128), (8, 8, 8)),
        masks.neighborhood((1024, 1024), 32, stride=16) & masks.causal(),
        masks.windows((1024, 1024), 16),
        masks.shifted_windows((1024, 1024), 16),
        masks.halo((1024, 1024), 8, 3),
        masks.per_head([masks.causal() & masks.sliding_window(1 << e) for e in (8, 12)]),
        masks.from_function(lambda b, h, q, k: k <= q),
    ],
    ids=repr,
)
def test_a_million_tokens_fit_in_100_mb(mask: Mask) -> None:
    assert peak_bytes(lambda: mask.blocks(MILLION)) < 100e6


def test_peak_bytes_sees_what_is_freed_again() -> None:
    assert peak_bytes(lambda: torch.zeros(1 << 20).sum()) >= 4 << 20


def test_a_structure_spelled_out() -> None:
    structure = (masks.causal() & (masks.sliding_window(4) | masks.sinks(2))).blocks(10, 10, 2)
    assert structure.grid()[0, 0].tolist() == [
        [SOME, NONE, NONE, NONE, NONE],
        [ALL, SOME, NONE, NONE, NONE],
        [ALL, ALL, SOME, NONE, NONE],
        [ALL, SOME, ALL, SOME, NONE],
        [ALL, NONE, SOME, ALL, SOME],
    ]


def test_partial_edge_blocks_count_with_their_own_size() -> None:
    structure = masks.full().blocks(10, 7, (4, 3))
    assert (structure.num_query_blocks, structure.num_key_blocks) == (3, 3)
    assert structure.pairs() == structure.pairs(ALL) == 70
    assert structure.density == 1
    assert [x.tolist() for x in structure.row(2)] == [[0], [3], [ALL]]


def test_lists_of_one_kind_and_width() -> None:
    structure = masks.causal().blocks(6, 6, 2)
    every = structure.lists(ALL, width=3)
    assert every.index[0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert every.count[0, 0].tolist() == [0, 1, 2]
    assert structure.lists(SOME).index[0, 0].tolist() == [[0], [1], [2]]
    assert masks.empty().blocks(6).lists().index.shape == (1, 1, 1, 0)


def test_rows_of_heads_and_batch_items() -> None:
    valid = torch.tensor([[True] * 4, [False] * 2 + [True] * 2])
    structure = (masks.per_head([masks.causal(), masks.full()]) & masks.padding(valid)).blocks(4, 4, 2)
    assert (structure.batch, structure.heads) == (2, 2)
    assert structure.row(0, b=1, h=1)[0].tolist() == [1]
    assert structure.row(0, b=1, h=0)[0].tolist() == []
    assert structure.grid()[0, 1].tolist() == [[ALL, ALL], [ALL, ALL]]


def test_combinations_are_cautious_unless_asked() -> None:
    mask = masks.strided(2) & ~masks.strided(2).shift(2)  # empty, which no part knows
    assert not mask.exact
    assert mask.blocks(8, block_size=4).density == 1
    assert mask.blocks(8, block_size=4, exact=True).density == 0


def test_a_function_is_asked_only_when_exact() -> None:
    mask = masks.from_function(lambda b, h, q, k: k <= q)
    assert mask.blocks(64, block_size=8).pairs(SOME) == 64 * 64
    exact = mask.blocks(60, block_size=8, exact=True)
    assert torch.equal(exact.grid(), masks.causal().blocks(60, block_size=8).grid())


def test_run_time_blocks_come_back_as_they_were() -> None:
    table = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    grid = masks.from_blocks(table, 16).blocks(5 * 16 - 3, 7 * 16, 16).grid()
    assert torch.equal(grid, table.to(torch.uint8) * ALL)


def test_random_blocks_keep_their_share() -> None:
    mask = masks.random_blocks(1024, 2048, 64, density=0.25, seed=3, heads=4)
    grid = mask.blocks(1024, 2048, 64).grid()
    assert (grid.bool().sum(-1) == 8).all()
    assert mask.density(1024, 2048) == 0.25
    assert torch.equal(grid, masks.random_blocks(1024, 2048, 64, 0.25, 3, 4).blocks(1024, 2048, 64).grid())
    assert not torch.equal(grid[:, 0], grid[:, 1])


def test_nbytes_and_moving() -> None:
    structure = masks.causal().blocks(1 << 14)
    assert structure.nbytes == sum(getattr(structure, x).nbytes for x in ("row_ptr", "start", "stop", "kind"))
    assert structure.to("meta").kind.device.type == "meta"


def test_positions_that_overflow_are_refused() -> None:
    with pytest.raises(Unsupported, match="overflow"):
        masks.causal().blocks(1 << 22, block_size=1)
