"""PeakMemory against allocations of known size."""

import time

import pytest
import torch

from regard.study import memory
from regard.study.memory import PeakMemory

MIB = 2**20
CPU = torch.device("cpu")
SLACK = 3 * MIB


def block(mebibytes):
    return torch.ones(mebibytes * MIB // 4)


def passing(mebibytes):
    """Memory that is freed again, but held for long enough that a sampling gauge on a busy machine sees it."""
    held = block(mebibytes)
    time.sleep(0.2)
    del held


@pytest.fixture(params=["sampled", *(["kept by the system"] if memory._Linux.works() else [])])
def meter(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(memory._Linux, "works", staticmethod(lambda: False))
    block(64)  # wakes up torch's threads and buffers
    return PeakMemory(CPU)


def test_counts_what_was_freed_again(meter):
    with meter:
        passing(64)
        small = block(1)
    assert meter.bytes == pytest.approx(64 * MIB, abs=SLACK)
    del small


def test_leaves_out_what_happens_in_between(meter):
    with meter:
        kept = block(32)
    aside = block(128)
    with meter:
        more = block(16)
    assert meter.bytes == pytest.approx(48 * MIB, abs=SLACK)
    del kept, aside, more


def test_the_worst_block_counts(meter):
    with meter:
        passing(64)
    with meter:
        passing(16)
    assert meter.bytes == pytest.approx(64 * MIB, abs=SLACK)


def test_what_is_freed_in_a_later_block_is_no_longer_held(meter):
    with meter:
        kept = block(48)
    with meter:
        del kept
    with meter:
        other = block(24)
    assert meter.bytes == pytest.approx(48 * MIB, abs=SLACK)
    del other
