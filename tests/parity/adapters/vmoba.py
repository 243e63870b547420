"""VMoBA: partitions, choices and attention for every kind of block."""

from collections.abc import Iterable

import torch

from regard.mechanisms.sparse.vmoba import partition, select_blocks, vmoba_attention
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs = golden.kwargs
    grid = tuple(kwargs["patch_resolution"])
    q, k, v = (golden.inputs[name].transpose(1, 2) for name in "qkv")
    settings = {"threshold": kwargs["simsum_threshold"], "topk": kwargs["moba_topk"], "across_batch": True}
    for name in golden.outputs:
        kind, *rest = name.split("/")
        if kind == "select":
            gate = golden.inputs["gate"]
            blocks, _, queries = gate.shape
            own = torch.arange(queries) // (queries // blocks) == torch.arange(blocks)[:, None]
            own = own[None, :, None].expand(1, *gate.shape)
            got = select_blocks(gate[None], own, "threshold", rest[0], **settings)
            yield golden.compare(name, got[0], atol=0)
        elif rest == ["partitioned_q"]:
            got = partition(q, grid, kwargs["chunk_sizes"][kind])
            yield golden.compare(name, got.transpose(1, 2), atol=ATOL)
        else:
            select, scope = rest
            got = vmoba_attention(q, k, v, grid, kwargs["chunk_sizes"][kind], select=select, scope=scope, **settings)
            yield golden.compare(name, got.transpose(1, 2), atol=ATOL)
