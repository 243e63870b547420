"""Selective scans against their recurrence, step by step."""

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.linear import linear_scan, selective_scan


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 16, 33])
def test_a_scan_is_its_recurrence(n: int) -> None:
    torch.manual_seed(0)
    decay, added = torch.rand(n, 2, 3, dtype=torch.float64), torch.randn(n, 2, 3, dtype=torch.float64)
    h, want = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(n):
        h = decay[t] * h + added[t]
        want.append(h)
    torch.testing.assert_close(linear_scan(decay, added), torch.stack(want))


def test_decays_may_vanish() -> None:
    decay = torch.tensor([0.0, 1e-300, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    added = torch.arange(1.0, 8.0, dtype=torch.float64)
    torch.testing.assert_close(linear_scan(decay, added), torch.tensor([1, 2, 3, 7, 5, 11, 18], dtype=torch.float64))


def arguments(n: int, lead: tuple[int, ...] = (2, 3), channels: int = 4, size: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "u": torch.randn(*lead, n, channels, dtype=torch.float64),
        "dt": torch.rand(*lead, n, channels, dtype=torch.float64),
        "a": -torch.rand(*lead[1:], channels, size, dtype=torch.float64),
        "b": torch.randn(*lead, n, size, dtype=torch.float64),
        "c": torch.randn(*lead, n, size, dtype=torch.float64),
        "d": torch.randn(*lead[1:], channels, dtype=torch.float64),
    }


def test_it_is_its_equation() -> None:
    given = arguments(5)
    got, state = selective_scan(**given)
    u, dt, a, b, c, d = given.values()
    for i in range(2):
        for j in range(3):
            for ch in range(4):
                h = [0.0, 0.0]
                for t in range(5):
                    step, x = dt[i, j, t, ch].item(), u[i, j, t, ch].item()
                    h = [math.exp(step * a[j, ch, s].item()) * h[s] + step * b[i, j, t, s].item() * x for s in range(2)]
                    y = sum(c[i, j, t, s].item() * h[s] for s in range(2)) + d[j, ch].item() * x
                    assert got[i, j, t, ch].item() == pytest.approx(y, abs=1e-12)
                assert state[i, j, ch].tolist() == pytest.approx(h)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_it_continues_from_its_state(cut: int) -> None:
    given = arguments(7)
    want, last = selective_scan(**given)
    per_token = ("u", "dt", "b", "c")
    parts = [{k: t[..., s, :] if k in per_token else t for k, t in given.items()} for s in (slice(cut), slice(cut, 7))]
    first, state = selective_scan(**parts[0])
    second, end = selective_scan(**parts[1], state=state)
    torch.testing.assert_close(torch.cat([first, second], -2), want)
    torch.testing.assert_close(end, last)


def test_gradients() -> None:
    given = {k: t.requires_grad_() for k, t in arguments(5, lead=(1, 2), channels=2, size=1).items()}
    state = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    run = lambda *args: selective_scan(*args[:-1], state=args[-1])  # noqa: E731
    assert torch.autograd.gradcheck(run, (*given.values(), state))
    assert torch.autograd.gradgradcheck(lambda *args: run(*args)[0], (*given.values(), state))


def test_half_precision_is_summed_wide() -> None:
    given = {k: t.bfloat16() for k, t in arguments(64).items()}
    got, state = selective_scan(**given)
    assert got.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    want, _ = selective_scan(**{k: t.double() for k, t in given.items()})
    torch.testing.assert_close(got, want.bfloat16(), atol=1e-2, rtol=1e-2)


def test_what_the_backward_keeps_grows_linearly() -> None:
    def kept(n: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        decay, added = (torch.rand(n, 8, requires_grad=True) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear_scan(decay, added)
        return sum(sizes.values())

    assert kept(4096) < 4.1 * kept(1024)
    assert kept(1024) < 8 * 1024 * 8 * 4


@pytest.mark.parametrize(
    ("name", "shape"),
    [("u", (4,)), ("dt", (2, 3, 5, 1)), ("a", (3, 2)), ("a", (2, 4, 2)), ("b", (2, 3, 5, 1)), ("d", (3, 3)), ("d", ())],
)
def test_bad_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=f"{name}: expected"):
        selective_scan(**arguments(5) | {name: torch.zeros(shape, dtype=torch.float64)})
    with pytest.raises(ShapeError, match="state: expected"):
        selective_scan(**arguments(5), state=torch.zeros(2, 3, 4, 1))
