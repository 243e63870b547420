"""The prefix softmax against a softmax over every prefix."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.linear import prefix as module
from regard.linear import prefix_softmax


def naive(scores: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(values)
    for b in range(len(scores)):
        for i in range(scores.shape[2]):
            keep = valid[b, : i + 1]
            if keep.any():
                weights = scores[b, :, : i + 1][:, keep].softmax(-1)
                out[b, :, i] = torch.einsum("hj,hje->he", weights, values[b, :, : i + 1][:, keep])
    return out


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 12), chunk=st.integers(1, 6), size=st.sampled_from([1.0, 500.0]), seed=st.integers(0, 99))
def test_every_prefix_is_a_softmax(n: int, chunk: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = size * torch.randn(2, 3, n, dtype=torch.float64, generator=generator)
    values = torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator)
    valid = torch.rand(2, n, generator=generator) > 0.3
    original, module._CHUNK = module._CHUNK, chunk
    try:
        got, state = prefix_softmax(scores, values, valid)
        first, half = prefix_softmax(scores[:, :, : n // 2], values[:, :, : n // 2], valid[:, : n // 2])
        second, again = prefix_softmax(scores[:, :, n // 2 :], values[:, :, n // 2 :], valid[:, n // 2 :], half)
    finally:
        module._CHUNK = original
    torch.testing.assert_close(got, naive(scores, values, valid))
    torch.testing.assert_close(torch.cat([first, second], 2), got)
    for a, b in zip(state, again, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients() -> None:
    scores = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[False, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda s, v: prefix_softmax(s, v, valid)[0], (scores, values))
