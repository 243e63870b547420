"""Attention inputs for tests, and every number an attention call produces."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from regard import masks
from regard.attention import Partial, attention
from regard.masks import Mask
from tests.masks.naive import BATCH, HEADS, cases


@dataclass(frozen=True)
class Inputs:
    """Arguments of one attention call; tensors are leaves that require gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | Tensor | None
    bias: Tensor | None
    scale: float | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_()

        query, key, value = (leaf(t) for t in (self.query, self.key, self.value))
        assert query is not None
        assert key is not None
        assert value is not None
        return Inputs(query, key, value, self.mask, leaf(self.bias), self.scale)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.query, self.key, self.value, self.bias) if t is not None]


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    n: int,
    m: int,
    dim: int,
    dim_v: int,
    mask: Mask | Tensor | None = None,
    bias: tuple[int, ...] | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Random float64 inputs; ``bias`` is the shape of one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return Inputs(
        normal(batch, heads, n, dim),
        normal(batch, kv_heads, m, dim),
        normal(batch, kv_heads, m, dim_v),
        mask,
        None if bias is None else normal(*bias),
        scale,
    )


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """Ragged shapes, grouped heads, and every kind of mask and bias."""
    case = draw(cases())
    n, m = case.n, case.m
    mask: Mask | Tensor | None = case.mask
    kind = draw(st.sampled_from(["expression", "expression", "lists", "lists & causal", "dense", "none"]))
    if kind.startswith("lists"):
        n, m = draw(st.integers(1, 90)), draw(st.integers(1, 150))
        block = draw(st.sampled_from([(8, 8), (16, 8), (8, 24), (5, 7)]))
        table = torch.rand(
            draw(st.sampled_from([1, BATCH])),
            draw(st.sampled_from([1, HEADS])),
            -(-n // block[0]),
            -(-m // block[1]),
            generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
        ) < draw(st.sampled_from([0.0, 0.2, 0.6]))
        mask = masks.from_blocks(table, block)
        if kind.endswith("causal"):
            mask = mask & masks.causal().shift(max(m - n, 0))
    elif kind == "dense":
        shape = draw(st.sampled_from([(n, m), (1, m), (HEADS, n, 1), (BATCH, 1, n, m)]))
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.4
    elif kind == "none":
        mask = None
    return make(
        BATCH,
        HEADS,
        draw(st.sampled_from([h for h in range(1, HEADS + 1) if HEADS % h == 0])),
        n,
        m,
        draw(st.sampled_from([1, 4, 5])),
        draw(st.sampled_from([1, 3, 4])),
        mask,
        draw(st.sampled_from([None, None, (n, m), (1, m), (HEADS, n, 1), (BATCH, 1, 1, m), (BATCH, HEADS, n, m)])),
        draw(st.sampled_from([None, 0.7])),
        draw(st.integers(0, 99)),
    )


def everything(x: Inputs, run: Callable[..., Partial] | str, through_lse: bool = True) -> dict[str, Tensor]:
    """Output, lse and all gradients of a fixed loss that looks at the output and (optionally) the lse.

    Args:
        run: a backend, or something to be called like `attention` that returns a `Partial`.
    """
    if isinstance(run, str):
        out, lse = attention(
            x.query, x.key, x.value, mask=x.mask, bias=x.bias, scale=x.scale, backend=run, return_lse=True
        )
    else:
        out, lse = run(x.query, x.key, x.value, mask=x.mask, bias=x.bias, scale=x.scale)
    loss = (out * weight_like(out)).sum()
    if through_lse:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * weight_like(lse)).sum()
    names = ["query", "key", "value", "bias"]
    grads = torch.autograd.grad(loss, x.leaves, allow_unused=True)
    found = {"out": out, "lse": lse}
    for name, leaf, grad in zip(names, x.leaves, grads, strict=False):
        found[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: t.detach() for name, t in found.items()}


def weight_like(t: Tensor) -> Tensor:
    return torch.arange(1, t.numel() + 1).sin().to(t.dtype).view(t.shape)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal to ``tolerance`` relative to the size of the numbers, with infinities in the same places."""
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        a = found[name].to(b.dtype)
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} has NaN"
        assert torch.equal(a.isinf(), b.isinf()), f"{name}: infinities differ"
        finite = b.isfinite()
        if finite.any():
            error = float((a[finite] - b[finite]).abs().max())
            assert error <= tolerance * max(1.0, float(b[finite].abs().max())), f"{name}: error {error:.3g}"
