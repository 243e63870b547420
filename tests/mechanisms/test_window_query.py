"""Queries of windows against plain loops."""

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers.dropout import dropout_attention
from regard.mechanisms.heads.window_query import WindowQueryAttention, window_means


def layer(**config) -> WindowQueryAttention:
    torch.manual_seed(0)
    made = WindowQueryAttention(**{"dim": 6, "num_heads": 2, **config}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


@pytest.mark.parametrize("window", [1, 3, 9])
def test_it_is_its_equations(window: int) -> None:
    attention = layer(window_size=window)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, :2] = False  # padded on the left, as recommenders do
    got = attention(x, valid=valid)
    norm, q, k, v = attention.norm, attention.q_proj, attention.k_proj, attention.v_proj
    for b in range(2):
        real = [t for t in range(5) if valid[b, t]]
        for t in real:
            mean = torch.stack([x[b, j] for j in real if t - window < j <= t]).mean(0)
            n = (mean - mean.mean()) / mean.var(correction=0).sqrt() * norm.weight + norm.bias
            want = n.clone()
            for h in (slice(0, 3), slice(3, 6)):
                scores = torch.stack([q(n)[h] @ k(x[b, j])[h] / 3**0.5 for j in real if j <= t])
                values = torch.stack([v(x[b, j])[h] for j in real if j <= t])
                want[h] += scores.softmax(0) @ values
            torch.testing.assert_close(got[b, t], want)


def test_padding_on_the_left_changes_nothing_and_gives_no_nan() -> None:
    attention = layer(window_size=3)
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    padded = torch.cat([torch.full((1, 3, 6), 7.0, dtype=torch.float64), x], 1).requires_grad_()
    valid = torch.arange(7)[None] >= 3
    out = attention(padded, valid=valid)
    torch.testing.assert_close(out[:, 3:], attention(x))
    assert out.isfinite().all()
    (gradient,) = torch.autograd.grad(out[:, 3:].square().sum(), padded)
    assert gradient.isfinite().all()
    assert not gradient[:, :3].any()


def test_streaming_with_padding() -> None:
    attention = layer(window_size=3)
    x, valid = torch.randn(2, 6, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    state, got = None, []
    for t in range(6):
        y, state = attention.stream(x[:, t : t + 1], state, valid=valid[:, t : t + 1])
        got.append(y)
    torch.testing.assert_close(torch.cat(got, 1)[valid], attention(x, valid=valid)[valid])


def test_means() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0, 4.0]])[..., None]
    torch.testing.assert_close(window_means(x, 2)[0, :, 0], torch.tensor([1.0, 1.5, 4.0, 5.0]))
    valid = torch.tensor([[False, True, True, False]])
    torch.testing.assert_close(window_means(x, 2, valid)[0, :, 0], torch.tensor([0.0, 2.0, 4.0, 6.0]))


def test_a_window_of_one_asks_with_the_token_itself() -> None:
    x = torch.randn(2, 5, 3)
    assert torch.equal(window_means(x, 1), x)


def test_gradients() -> None:
    attention = layer(window_size=2)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x,))


def test_weights_are_dropped_in_training_only() -> None:
    attention = layer(window_size=2, dropout=0.5, residual=False)
    x = torch.randn(1, 40, 6, dtype=torch.float64)
    assert torch.equal(attention.eval()(x), attention(x))
    assert not torch.equal(attention.train()(x), attention(x))


def test_weights_not_values_are_dropped() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    torch.manual_seed(1)
    got = dropout_attention(q, k, v, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(got, F.dropout((q @ k.mT / 2).softmax(-1), 0.5) @ v)


def test_all_weights_dropped_is_zero() -> None:
    q = torch.randn(1, 4, 3, 2)
    assert torch.equal(dropout_attention(q, q[:, :2], q[:, :2], 1.0), torch.zeros_like(q))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"window_size": 0}, "window_size: expected"), ({"num_heads": 5}, "num_heads"), ({"dropout": 2.0}, "dropout")],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        layer(**config)
