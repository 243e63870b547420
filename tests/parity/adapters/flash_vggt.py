"""FlashVGGT's attention: with and without key frames, dense, and a stream of chunks."""

from collections.abc import Iterable

import torch

import regard
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5
LAYER = ("dim", "num_heads", "qkv_bias", "proj_bias", "qk_norm", "rope_freq", "kv_downfactor", "compressor_type")


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs = {name: golden.kwargs[name] for name in LAYER if name in golden.kwargs}
    layer = regard.from_official("flash-vggt", golden.state(), **kwargs)
    dense = regard.from_official("flash-vggt", golden.state(), **kwargs | {"kv_downfactor": 1})
    grid = (golden.kwargs["pH"], golden.kwargs["pW"])
    frames = golden.inputs["x"].shape[1] // (golden.kwargs["patch_start_idx"] + grid[0] * grid[1])
    x = golden.inputs["x"].unflatten(1, (frames, -1)).requires_grad_()
    positions = golden.inputs["pos"].unflatten(1, (frames, -1))

    y = layer(x, grid, positions=positions, keyframes=golden.inputs["keyframe_indices"]).flatten(1, 2)
    yield golden.compare("attn", y, ATOL)
    yield golden.compare("grad/in/x", torch.autograd.grad(y.sum(), x)[0].flatten(1, 2), ATOL)
    yield golden.compare("attn_full", dense(x, grid, positions=positions).flatten(1, 2), ATOL)
    yield golden.compare("attn_no_keyframes", layer(x, grid, positions=positions).flatten(1, 2), ATOL)

    state, chunks, drop_rate = None, [], golden.kwargs.get("memory_drop_rate", 1)
    sizes = golden.kwargs["stream_split"]
    for chunk, places in zip(x.split(sizes, 1), positions.split(sizes, 1), strict=True):
        y, state = layer.stream(chunk, grid, state, positions=places, drop_rate=drop_rate)
        chunks.append(y)
    yield golden.compare("stream", torch.cat(chunks, 1).flatten(1, 2), ATOL)
    yield golden.compare("stream_cache_len", torch.tensor([state.tokens.shape[1]]), 0)
