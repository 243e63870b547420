"""HyperAttention: full, padded, causal and exact, with the published projection and samples."""

from collections.abc import Iterable

import torch

from regard.mechanisms.sparse.hyper import HyperAttention
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, inputs = golden.kwargs, golden.inputs
    attend = HyperAttention(
        kwargs["input_dim"],
        kwargs["lsh_num_projs"],
        kwargs["block_size"],
        kwargs["sample_size"],
        kwargs["min_seq_len"],
        mask_padding=False,
        mask_samples=False,
        merge_eps=torch.finfo(torch.float32).eps,
    )
    attend.projection = inputs["lsh_proj_dir"][0, 0]
    yield golden.compare("hash", attend.hash(inputs["hash_in"]), atol=0)
    codes = torch.arange(2 ** attend.projection.shape[1])
    yield golden.compare("lsh_perm", codes ^ (codes >> 1), atol=0)
    for case, (_, _, causal) in kwargs["cases"].items():
        q, k, v = (inputs[f"{case}/{name}"].clone().requires_grad_() for name in "qkv")
        drawn = sum(name.startswith(f"{case}/sampled_set") for name in inputs)
        samples = [inputs[f"{case}/sampled_set{i}"] for i in range(drawn)]
        out, lse = attend(q, k, v, causal=causal, samples=samples)
        yield golden.compare(f"{case}/out", out, atol=1e-5)
        yield golden.compare(f"{case}/lse", lse.unsqueeze(-1), atol=1e-5)
        for name, gradient in zip("qkv", torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            yield golden.compare(f"{case}/grad_{name}", gradient, atol=1e-4)
