"""Attention for in-context regression against loops, its circuits, and both causal stacks."""

import math

import pytest
import torch

import regard
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.heads.in_context import InContextAttention


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def layer(module: torch.nn.Module, z_q: torch.Tensor, z: torch.Tensor, stack: str = "") -> torch.Tensor:
    """(N, n_out) head by head and query by query; ``stack``: "" sees all of z, else "once" or "twice" softmax."""
    width, rows = z.shape[1], []
    for i, query in enumerate(z_q):
        out = torch.zeros(module.o_proj.out_features, dtype=z.dtype)
        for h in range(module.num_heads):
            part = slice(h * width, (h + 1) * width)
            q = module.q_proj.weight[part] @ query
            keys = [module.k_proj.weight[part] @ row for row in z]
            scores = [float(q @ k) / math.sqrt(width) for k in keys]
            if stack == "twice":
                scores = softmax(scores)
            weights = softmax(scores[: i + 1] if stack else scores)
            mixed = sum(w * (module.v_proj.weight[part] @ row) for w, row in zip(weights, z, strict=False))
            out = out + module.o_proj.weight[:, part] @ mixed
        rows.append(out)
    return torch.stack(rows)


@torch.no_grad()
def test_one_layer_equals_loops() -> None:
    model = InContextAttention(4, 3, n_out=2).double()
    z_q, z = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    want = torch.stack([layer(model.layers[0], z_q[b], z[b]) for b in range(2)])
    torch.testing.assert_close(model(z_q, z), want)


@torch.no_grad()
@pytest.mark.parametrize(("double", "stack"), [(False, "once"), (True, "twice")])
@pytest.mark.parametrize("tied", [False, True])
def test_stacks_equal_loops(double, stack, tied) -> None:
    model = InContextAttention(3, 2, num_layers=2, weight_tying=tied, double_softmax=double).double()
    z_q, z = torch.randn(1, 1, 3, dtype=torch.float64), torch.randn(1, 6, 3, dtype=torch.float64)
    x = torch.cat([z[0], z_q[0]])
    for i in range(2):
        x = layer(model.layers[0 if tied else i], x, x, stack)
    torch.testing.assert_close(model(z_q, z)[0], x[-1:] @ model.final_linear.weight.T)
    assert len(model.layers) == (1 if tied else 2)


@torch.no_grad()
def test_circuits_are_all_that_matters() -> None:
    """Scores are z_q KQ zᵀ / √E and values z OV, so the answer follows from the circuits alone."""
    model = InContextAttention(5, 4, n_out=2).double()
    z_q, z = torch.randn(3, 1, 5, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    KQ, OV = model.layers[0].circuits()
    assert (KQ.shape, OV.shape) == ((4, 5, 5), (4, 5, 2))
    weights = (z_q[:, None] @ KQ @ z.mT[:, None] / 5**0.5).softmax(-1)
    torch.testing.assert_close(model(z_q, z), (weights @ (z[:, None] @ OV)).sum(1))


@torch.no_grad()
def test_only_the_published_stack_sees_the_future() -> None:
    z = torch.randn(1, 6, 3)
    later = torch.cat([z[:, :3], torch.randn(1, 3, 3)], 1)
    for double in (False, True):
        stack = InContextAttention(3, 2, num_layers=2, double_softmax=double)
        first, second = (stack.layers[0](x, x, True, double)[:, :3] for x in (z, later))
        assert torch.equal(first, second) is not double


def test_gradients() -> None:
    for layers in (1, 2):
        model = InContextAttention(3, 2, num_layers=layers, double_softmax=layers > 1).double()
        z_q = torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
        z = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(model, (z_q, z))


def test_published_weights_of_a_tied_stack() -> None:
    model = InContextAttention(3, 2, num_layers=2, weight_tying=True, double_softmax=True)
    weights = {n.removeprefix("layers.0."): t for n, t in model.state_dict().items() if n.startswith("layers")}
    state = {f"attention_layers.{i}.{n}": t for i in range(2) for n, t in weights.items()}
    state |= {f"attention_layers.{i}.bias": torch.tensor(-1e9) for i in range(2)}
    state["final_linear.weight"] = model.final_linear.weight
    kwargs = {"n_layers": 2, "d_model": 3, "num_heads": 2, "weight_tying": True}
    loaded = regard.from_official("icl-linear-attention", state, **kwargs)
    z_q, z = torch.randn(2, 1, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(loaded(z_q, z), model(z_q, z))
    with pytest.raises(ArgumentError, match="missing"):
        regard.from_official("icl-linear-attention", state | {}, **{**kwargs, "weight_tying": False, "n_layers": 3})
    with pytest.raises(ArgumentError, match="unknown argument depth"):
        regard.from_official("icl-linear-attention", state, **kwargs, depth=1)


def test_refusals() -> None:
    for config in ({"num_heads": 0}, {"d_model": 0}, {"num_layers": 0}, {"n_out": 0}):
        with pytest.raises(ArgumentError, match=next(iter(config))):
            InContextAttention(**({"d_model": 3, "num_heads": 2} | config))
    with pytest.raises(ArgumentError, match="double_softmax"):
        InContextAttention(3, 2, double_softmax=True)
    model = InContextAttention(3, 2)
    with pytest.raises(ShapeError, match="z_q: expected"):
        model(torch.randn(1, 1, 4), torch.randn(1, 5, 3))
    with pytest.raises(ShapeError, match="z: expected a batch of 2"):
        model(torch.randn(2, 1, 3), torch.randn(1, 5, 3))
    with pytest.raises(ShapeError, match="one query"):
        InContextAttention(3, 2, num_layers=2)(torch.randn(1, 2, 3), torch.randn(1, 5, 3))
