"""A learnt bias per key goes along as channels of the keys; nothing else does."""

import pytest
import torch

import regard
from regard import masks
from regard.attention.problem import bias_as_channels, checked


def tensors(dtype=torch.float64, n=9, heads=4, kv_heads=2):
    torch.manual_seed(0)
    q = torch.randn(2, heads, n, 6, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 7, size, dtype=dtype, requires_grad=True) for size in (6, 5))
    return q, k, v


@pytest.mark.parametrize("shape", [(2, 4, 1, 7), (1, 4, 1, 7), (2, 1, 1, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("masked", ["none", "tensor", "structured"])
def test_outputs_lse_and_gradients_are_those_of_the_reference(shape, masked) -> None:
    q, k, v = tensors()
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = {"none": None, "tensor": torch.rand(2, 4, 9, 7) > 0.4, "structured": masks.sliding_window(3)}[masked]
    assert bias_as_channels(checked(q, k, v, mask, bias, None)).bias is None
    found = []
    for backend in ("auto", "reference"):
        out, lse = regard.attention(q, k, v, mask=mask, bias=bias, backend=backend, return_lse=True)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
        found.append((out, lse, *torch.autograd.grad(loss, (q, k, v, bias))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)


def test_where_it_would_not_be_exact_it_stays_a_bias() -> None:
    q, k, v = tensors()
    bias = torch.randn(1, 4, 1, 7, dtype=torch.float64, requires_grad=True)

    def stays(bias: torch.Tensor, scale: float | None = None, **same) -> bool:
        return bias_as_channels(checked(*same.get("qkv", (q, k, v)), None, bias, scale)).bias is not None

    assert stays(bias.detach())
    assert stays(torch.randn(1, 4, 9, 7, dtype=torch.float64, requires_grad=True))
    assert stays(bias, scale=0.0)
    assert stays(torch.full_like(bias, -torch.inf).requires_grad_())
    half = tuple(t.detach().bfloat16().requires_grad_() for t in (q, k, v))
    assert stays(bias.detach().bfloat16().requires_grad_(), qkv=half)
    with torch.no_grad():
        assert stays(bias)
