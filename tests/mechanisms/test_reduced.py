"""Attention with fewer matrices: against the equations, the full layer, and the counts of its paper."""

import pytest
import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.heads.reduced import QK, VO, ReducedAttention, merge_qk, merge_vo, overdetermination
from regard.models.vision.reduced import ReducedTransformer

DIM = 6


def layer(qk: QK = "separate", vo: VO = "full", num_heads: int = 1, bias: bool = False, **changes) -> ReducedAttention:
    torch.manual_seed(0)
    module = ReducedAttention(DIM, num_heads, qk, vo, bias, **{"causal": False, **changes}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def tokens(n: int = 5) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def triangle(module: ReducedAttention) -> Tensor:
    entries = iter(module.q_proj.entries)
    return torch.stack(
        [torch.stack([next(entries) if j <= i else torch.tensor(0.0) for j in range(DIM)]) for i in range(DIM)]
    )


def naive(m: ReducedAttention, x: Tensor) -> Tensor:
    """Row by row from the equations, in x W order; no biases."""
    d = DIM // m.num_heads
    y = torch.zeros_like(x)
    for b, row in enumerate(x):
        for i in range(len(row)):
            keys = range(i + 1) if m.causal else range(len(row))
            for h in range(m.num_heads):
                own = slice(h * d, (h + 1) * d)
                if m.qk == "cholesky":
                    t = triangle(m)
                    form = t @ t.T
                elif m.qk == "merged":
                    form = m.q_proj.weight.T
                else:
                    other = m.k_proj if m.qk == "separate" else m.q_proj
                    form = m.q_proj.weight.T[:, own] @ other.weight.T[:, own].T
                p = torch.stack([row[i] @ form @ row[j] for j in keys]).div(d**0.5).softmax(0)
                mixed = sum(w * row[j] for w, j in zip(p, keys, strict=True))
                if m.vo == "none":
                    y[b, i] += mixed / m.num_heads
                elif m.vo == "merged":
                    y[b, i] += mixed @ m.o_proj.weight.T
                else:
                    y[b, i] += mixed @ m.v_proj.weight.T[:, own] @ m.o_proj.weight.T[own]
    return y


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("qk", "vo", "num_heads"), [
    ("separate", "full", 2), ("separate", "none", 3), ("merged", "none", 1), ("merged", "merged", 1),
    ("symmetric", "full", 2), ("symmetric", "none", 1), ("cholesky", "full", 1), ("cholesky", "none", 1),
])  # fmt: skip
def test_is_the_equation(qk: QK, vo: VO, num_heads: int, causal: bool) -> None:
    module = layer(qk, vo, num_heads, causal=causal)
    close(module(tokens()), naive(module, tokens()))


@pytest.mark.parametrize("bias", [False, True])
def test_merging_is_exact(bias: bool) -> None:
    module, x = layer(bias=bias, causal=True), tokens()
    want = module(x)
    close(merge_qk(module)(x), want)
    close(merge_vo(module)(x), want)
    close(merge_vo(merge_qk(module))(x), want)
    close(merge_qk(merge_vo(module))(x), want)


@pytest.mark.parametrize(("qk", "num_heads"), [("symmetric", 1), ("symmetric", 3), ("cholesky", 1)])
def test_symmetric_scores(qk: QK, num_heads: int) -> None:
    scores = layer(qk, num_heads=num_heads, bias=True).scores(tokens())
    close(scores, scores.mT)
    assert (scores.diagonal(dim1=-2, dim2=-1) >= 0).all()
    separate = layer("separate").scores(tokens())
    assert not torch.allclose(separate, separate.mT)


def test_without_value_and_output_the_result_is_a_convex_combination() -> None:
    module, x = layer("merged", "none"), tokens()
    weights = (module.scores(x)[:, 0] / DIM**0.5).softmax(-1)
    close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    close(module(x), weights @ x)


def test_torch_with_identity_keys_is_the_merged_form() -> None:
    """The authors' trick in Keras: keep the framework's layer and fix the key matrix to the identity."""
    module, x = layer("merged", "full"), tokens()
    torch_layer = nn.MultiheadAttention(DIM, 1, bias=False, batch_first=True).double()
    with torch.no_grad():
        identity = torch.eye(DIM, dtype=torch.float64)
        torch_layer.in_proj_weight.copy_(torch.cat([module.q_proj.weight, identity, module.v_proj.weight]))
        torch_layer.out_proj.weight.copy_(module.o_proj.weight)
    close(module(x), torch_layer(x, x, x)[0])


def test_value_and_output_matrices_of_a_stack_collapse_to_one() -> None:
    """Without residuals and norms, W_1 moves into the next layer's scores, and the product is applied at the end."""
    torch.manual_seed(2)
    first, second = (ReducedAttention(DIM, 1, "merged", "merged").double() for _ in range(2))
    x = tokens()
    bare = [ReducedAttention(DIM, 1, "merged", "none").double() for _ in range(2)]
    w1, w2 = first.o_proj.weight, second.o_proj.weight
    with torch.no_grad():
        bare[0].q_proj.weight.copy_(first.q_proj.weight)
        bare[1].q_proj.weight.copy_(w1.T @ second.q_proj.weight @ w1)
    close(second(first(x)), bare[1](bare[0](x)) @ (w2 @ w1).T)


@pytest.mark.parametrize(("qk", "vo", "count"), [
    ("separate", "full", 4 * 64**2), ("merged", "full", 3 * 64**2), ("symmetric", "full", 3 * 64**2),
    ("cholesky", "full", 64 * 65 // 2 + 2 * 64**2), ("merged", "none", 64**2), ("merged", "merged", 2 * 64**2),
])  # fmt: skip
def test_counts(qk: QK, vo: VO, count: int) -> None:
    assert sum(p.numel() for p in ReducedAttention(64, 1, qk, vo).parameters()) == count


def test_counts_of_the_model() -> None:
    def count(**changes) -> int:
        return sum(p.numel() for p in ReducedTransformer(8, 2, 1, 10, **changes).parameters())

    mlp = 64 * 256 * 2 + 256 + 64 + 2 * 64
    assert count() - count(mlp=False) == 6 * mlp
    least = {"mlp": False, "qk": "merged"}
    assert count(vo="shared", **least) - count(vo="none", **least) == 64**2
    assert count(mlp=False) - count(vo="shared", **least) == 6 * 4 * 64**2 - 7 * 64**2  # (S + 1) d² remain
    assert count(**least, vo="none") < 0.15 * count()


def test_cholesky_starts_with_norm_one() -> None:
    matrix = ReducedAttention(32, qk="cholesky").q_proj.matrix()
    assert torch.equal(matrix, matrix.tril())
    assert torch.linalg.matrix_norm(matrix @ matrix.T, 2).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("qk", "vo"), [("cholesky", "none"), ("symmetric", "full")])
def test_gradients(qk: QK, vo: VO) -> None:
    module = layer(qk, vo)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (tokens(3).requires_grad_(), *module.parameters()))


@pytest.mark.parametrize("changes", [
    {}, {"pool": "cls"}, {"qk": "symmetric", "num_heads": 4}, {"mlp": False, "qk": "merged", "vo": "shared"},
    {"norm": False, "residual": False},
])  # fmt: skip
def test_the_model_classifies(changes: dict) -> None:
    torch.manual_seed(0)
    model = ReducedTransformer((8, 12), 4, 3, 5, dim=16, depth=2, **changes)
    images = torch.randn(2, 3, 8, 12)
    logits = model(images)
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_overdetermination() -> None:
    assert overdetermination(60_000, 10, 100_000) == 6.0


def test_refusals() -> None:
    for arguments in ({"qk": "merged"}, {"qk": "cholesky"}, {"vo": "merged"}):
        with pytest.raises(ArgumentError, match="num_heads"):
            ReducedAttention(8, 2, **arguments)
    with pytest.raises(ArgumentError, match="qk: expected one of separate, merged"):
        ReducedAttention(8, qk="shared")
    with pytest.raises(ArgumentError, match="vo: expected"):
        ReducedAttention(8, vo="shared")
    with pytest.raises(ArgumentError, match="layer: expected qk='separate'"):
        merge_qk(layer("merged"))
    with pytest.raises(ArgumentError, match="layer: expected vo='full'"):
        merge_vo(layer(num_heads=2))
    with pytest.raises(ArgumentError, match="patch_size"):
        ReducedTransformer(8, 3, 1, 10)
    with pytest.raises(ArgumentError, match="pool"):
        ReducedTransformer(8, 2, 1, 10, pool="max")
    with pytest.raises(ArgumentError, match="num_heads"):
        ReducedTransformer(8, 2, 1, 10, num_heads=2, vo="shared")
    with pytest.raises(ShapeError, match="images"):
        ReducedTransformer(8, 2, 1, 10)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ArgumentError, match="num_parameters"):
        overdetermination(1, 1, 0)
