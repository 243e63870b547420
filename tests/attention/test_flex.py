"""Compiled FlexAttention: few and small, because every mask compiles."""

from collections.abc import Iterator

import pytest
import torch

from regard import masks
from regard.attention import attention, flex
from regard.attention.problem import checked
from regard.errors import Unsupported
from tests.attention.inputs import make


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()
    flex._compiled.cache_clear()


@pytest.mark.parametrize(
    ("mask", "bias", "n", "m", "kv_heads"),
    [
        (masks.sliding_window(9) & masks.causal().shift(30), None, 70, 100, 1),
        (masks.causal().shift(-20), (2, 1, 40), 70, 40, 2),
    ],
)
def test_flex_equals_the_reference(mask: masks.Mask, bias: tuple | None, n: int, m: int, kv_heads: int) -> None:
    x = make(2, 2, kv_heads, n, m, 16, 16, mask, bias).to(torch.float32)
    with torch.no_grad():
        found = attention(x.query, x.key, x.value, mask=mask, bias=x.bias, backend="flex")
        expected = attention(x.query, x.key, x.value, mask=mask, bias=x.bias, backend="reference")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_flex_refuses_what_it_cannot_do() -> None:
    x = make(1, 2, 2, 8, 8, 4, 4)
    with pytest.raises(Unsupported, match="no float64"), torch.no_grad():
        attention(x.query, x.key, x.value, backend="flex")
    single = x.to(torch.float32)
    with pytest.raises(Unsupported, match="no backward on the CPU"):
        attention(single.query, single.key, single.value, backend="flex")
    with pytest.raises(Unsupported, match="no log-sum-exp on the CPU"), torch.no_grad():
        attention(single.query, single.key, single.value, backend="flex", return_lse=True)


def test_a_missing_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    x = make(1, 2, 2, 24, 24, 4, 4).to(torch.float32)
    with pytest.raises(Unsupported, match="could not compile FlexAttention here"), torch.no_grad():
        flex.run(checked(x.query, x.key, x.value, masks.sliding_window(5)))


def test_rows_that_see_nothing_are_zero_whatever_the_kernel_leaves_there(monkeypatch) -> None:
    """The CPU kernel's unwritten memory is NaN now and then; a NaN where keys are seen is the caller's own."""

    def kernel(query, *args, **kwargs):
        out = torch.ones_like(query)
        out[:, :, :3] = torch.nan  # queries 0..2 see nothing under the mask below
        out[0, 0, 7] = torch.nan
        return out

    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    q = torch.randn(1, 2, 9, 4)
    out = attention(q, q, q, mask=masks.causal().shift(-3), backend="flex")
    assert torch.equal(out[:, :, :3], torch.zeros(1, 2, 3, 4))
    assert bool(out[0, 0, 7].isnan().all())
    assert bool((out[0, 1, 3:] == 1).all())
