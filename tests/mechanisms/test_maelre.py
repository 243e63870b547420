"""MAELRE against its equations written out, and its model on padded and odd inputs."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.linear.maelre import AdaptiveAttention, cross_covariance_attention, efficient_attention
from regard.models.multimodal.maelre import MAELRE, TokenMerge


def qkv(n: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(2, 3, n, 4, dtype=dtype, generator=generator).requires_grad_() for _ in range(3))


def test_linear_form_is_its_equation() -> None:
    q, k, v = qkv(9)
    got = efficient_attention(q, k, v)
    for b in range(2):
        for h in range(3):
            rows = torch.stack([(row / 2).exp() / (row / 2).exp().sum() for row in q[b, h]])
            columns = torch.stack([c.exp() / c.exp().sum() for c in k[b, h].T])
            torch.testing.assert_close(got[b, h], rows @ (columns @ v[b, h]))


def test_xca_is_its_equation() -> None:
    q, k, v = qkv(9)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    got = cross_covariance_attention(q, k, v, temperature)
    for h in range(3):
        qh, kh = (t[0, h] / t[0, h].square().sum(0).sqrt() for t in (q, k))
        scores = torch.stack([torch.stack([(qh[:, i] * kh[:, j]).sum() for j in range(4)]) for i in range(4)])
        weights = (temperature[h] * scores).softmax(-1)
        want = torch.stack([(weights[i] * v[0, h]).sum(-1) for i in range(4)], -1)
        torch.testing.assert_close(got[0, h], want)


@pytest.mark.parametrize("form", ["linear", "xca"])
def test_gradients(form: str) -> None:
    temperature = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, temperature):
        return efficient_attention(q, k, v) if form == "linear" else cross_covariance_attention(q, k, v, temperature)

    assert torch.autograd.gradcheck(call, (*qkv(3), temperature))


def test_up_to_the_threshold_it_is_softmax_attention() -> None:
    torch.manual_seed(0)
    module = AdaptiveAttention(16, 2, threshold=8)
    x = torch.randn(2, 8, 16)
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.o_proj(want), atol=1e-6, rtol=1e-6)
    longer = torch.cat([x, torch.randn(2, 1, 16)], 1)
    assert not torch.allclose(AdaptiveAttention.forward(module, longer)[:, :8], module(x), atol=1e-3)


def test_a_sequence_without_any_token_gives_zeros() -> None:
    q, k, v = qkv(5)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1] = False
    got = efficient_attention(q, k, v, valid)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    torch.testing.assert_close(got[0], efficient_attention(q, k, v)[0])


def test_no_matrix_over_the_tokens_is_made() -> None:
    module = AdaptiveAttention(16, 2)
    x = torch.randn(1, 16384, 16)  # a 16384 x 16384 matrix would take a gigabyte
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch(), torch.no_grad():
        module(x)
    assert largest <= x.numel()


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_merging_joins_consecutive_tokens(n: int) -> None:
    torch.manual_seed(0)
    merge = TokenMerge(5, 7, 4)
    x = torch.randn(2, n, 5)
    got, valid = merge(x)
    assert valid is None
    groups = [torch.cat([*x[0, i : i + 4], *[torch.zeros(5)] * max(0, i + 4 - n)]) for i in range(0, n, 4)]
    torch.testing.assert_close(got[0], torch.stack([merge.proj(merge.norm(group)) for group in groups]))


def test_masked_tokens_never_change_the_model() -> None:
    torch.manual_seed(0)
    model = MAELRE(3, in_channels=5, dims=(8, 16), depths=(1, 1), num_heads=(2, 2), merge=(4,), max_length=64).eval()
    x = torch.randn(2, 21, 5)
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[1, 13:] = False
    other = x.clone()
    other[1, 13:] = 100.0
    torch.testing.assert_close(model(other, valid), model(x, valid), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x, valid)[1], model(x[1:, :13])[0], atol=1e-5, rtol=0)


def test_token_ids_and_training() -> None:
    torch.manual_seed(0)
    model = MAELRE(2, vocab_size=30, dims=(8, 16), depths=(1, 1), num_heads=(2, 2), merge=(3,), max_length=40)
    ids = torch.randint(0, 30, (4, 35))
    model(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"approximation": "taylor"}, "approximation: expected one of linear, xca"),
        ({"threshold": "tokens"}, "threshold: expected"),
        ({"num_heads": 3}, "3 heads do not divide dim 16"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        AdaptiveAttention(**{"dim": 16, "num_heads": 2, **config})


def test_bad_models_and_inputs() -> None:
    with pytest.raises(ArgumentError, match="exactly one"):
        MAELRE(3)
    with pytest.raises(ArgumentError, match="one merge less"):
        MAELRE(3, vocab_size=5, merge=(4,))
    with pytest.raises(ShapeError, match=r"x: expected \(B, N, 5\)"):
        MAELRE(3, in_channels=5)(torch.zeros(2, 3, 4))
