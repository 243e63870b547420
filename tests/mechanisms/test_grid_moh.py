"""Mixtures of heads on grids: head by head and token by token from plain attention, conversion, gradients, refusals."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.grid.aggregated import AggregatedAttention, CosineAttention
from regard.mechanisms.grid.moh import (
    MixtureOfHeadAggregatedAttention,
    MixtureOfHeadCosineAttention,
    mixture_of_heads,
)

KINDS = {"global": {}, "aggregated": {"sr_ratio": 2}}


def plain(kind: str) -> CosineAttention:
    torch.manual_seed(0)
    found = CosineAttention(12, 6, 4) if kind == "global" else AggregatedAttention(12, 6, 4, **KINDS[kind])
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.5)
    return found.double()


def gates(layer: MixtureOfHeadCosineAttention, x: Tensor) -> list[float]:
    """Of one token, from the equations."""
    shared, k = layer.shared_heads, layer.routed_heads
    out = [torch.ones((), dtype=x.dtype)] * shared
    if shared > 1:
        out = list(shared * (layer.wg_1.weight @ x).softmax(0))
    if not k:
        return out
    p = (layer.wg.weight @ x).softmax(0)
    best = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    routed = [k * p[i] / sum(p[j] for j in best) if i in best else torch.zeros_like(p[0]) for i in range(len(p))]
    if shared:
        a = 2 * (layer.wg_0.weight @ x).softmax(0)
        return [a[0] * g for g in out] + [a[1] * g for g in routed]
    return routed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shared", "routed"), [(3, 2), (1, 3), (0, 2), (6, 0)])
def test_gates_multiply_heads(kind: str, shared: int, routed: int) -> None:
    base = plain(kind)
    layer = mixture_of_heads(base, shared, routed)
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    y, (proj, base.proj) = layer(x), (base.proj, nn.Identity())
    heads = base(x).unflatten(-1, (6, 2))
    for b in range(2):
        for r in range(4):
            for c in range(5):
                gated = [g * o for g, o in zip(gates(layer, x[b, r, c]), heads[b, r, c], strict=True)]
                torch.testing.assert_close(y[b, r, c], proj(torch.cat(gated)))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_one_leave_the_attention(kind: str) -> None:
    base = plain(kind)
    layer = mixture_of_heads(base, 6, 0)
    assert {name for name, _ in layer.named_parameters()} - {name for name, _ in base.named_parameters()} == {
        "wg_1.weight"
    }
    with torch.no_grad():
        layer.wg_1.weight.zero_()
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_published_names(kind: str) -> None:
    torch.manual_seed(0)
    layer = regard.create(
        f"moh/{kind}", dim=12, num_heads=6, pretrain_grid=4, shared_heads=3, routed_heads=2, **KINDS[kind]
    )
    state = {n.replace("cpb.0", "cpb_fc1").replace("cpb.2", "cpb_fc2"): t for n, t in layer.state_dict().items()}
    given = {"dim": 12, "num_heads": 6, "input_resolution": (4, 4), "shared_head": 3, "routed_head": 2, **KINDS[kind]}
    x = torch.randn(1, 4, 4, 12)
    torch.testing.assert_close(regard.from_official("moh", state, variant=kind, **given)(x), layer(x), atol=0, rtol=0)


def test_gradients() -> None:
    x = torch.randn(1, 2, 3, 12, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        assert torch.autograd.gradcheck(mixture_of_heads(plain(kind), 3, 2), (x,))


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="shared_heads: expected 0 to 6, got 7"):
        MixtureOfHeadCosineAttention(12, 6, 4, shared_heads=7)
    with pytest.raises(ArgumentError, match="routed_heads: expected 0 to 3, got 4"):
        MixtureOfHeadAggregatedAttention(12, 6, 4, shared_heads=3, routed_heads=4)
    with pytest.raises(ShapeError, match="sr_ratio"):
        MixtureOfHeadAggregatedAttention(12, 6, 4)(torch.randn(1, 4, 4, 12))
