"""SHViT: single-head attention against its definition, folded batch norms, sizes and costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.single_head import SingleHeadAttention
from tests.models.vision.counts import gigamacs, millions


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters and statistics that hide nothing: zero-initialised branches would."""
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0, 0.5)
    return module.eval()


def normalised(bn: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


@pytest.mark.parametrize(("height", "width", "partial_dim"), [(3, 5, 3), (1, 1, 3), (2, 2, 6)])
def test_it_is_its_definition(height: int, width: int, partial_dim: int) -> None:
    layer = randomised(SingleHeadAttention(6, partial_dim, qk_dim=2)).double()
    x = torch.randn(2, height, width, 6, dtype=torch.float64)
    want = torch.empty_like(x)
    for b in range(2):
        first = x[b, :, :, :partial_dim].reshape(-1, partial_dim)
        first = (first - first.mean()) / (first.var(unbiased=False) + 1e-5).sqrt()
        first = first * layer.pre_norm.weight + layer.pre_norm.bias
        qkv = normalised(layer.qkv.bn, first @ layer.qkv.conv.weight.T)
        rows = []
        for token in qkv:
            weights = torch.stack([(token[:2] @ other[2:4] / 2**0.5).exp() for other in qkv])
            rows.append((weights[:, None] * qkv[:, 4:]).sum(0) / weights.sum())
        both = torch.cat([torch.stack(rows), x[b].reshape(-1, 6)[:, partial_dim:]], 1)
        want[b] = normalised(layer.proj.bn, both.relu() @ layer.proj.conv.weight.T).view(height, width, 6)
    torch.testing.assert_close(layer(x), want)


def test_gradients() -> None:
    layer = randomised(SingleHeadAttention(4, 3, qk_dim=2)).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_channels_beyond_the_partial_ones_see_no_neighbours() -> None:
    layer = randomised(SingleHeadAttention(6, 2, qk_dim=2))
    x = torch.randn(1, 3, 4, 6)
    other = x.clone()
    other[0, 2, 3, 2:] += 1
    changed = (layer(x) - layer(other)).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[2, 3]]
    with torch.no_grad():
        layer.proj.conv.weight[:, :2] = 0  # without the attention's output
    shuffled = x.clone()
    shuffled[..., :2] = x[..., :2].flatten(1, 2)[:, torch.randperm(12)].view(1, 3, 4, 2)
    torch.testing.assert_close(layer(x), layer(shuffled), atol=0, rtol=0)


def test_the_cost_is_the_formula() -> None:
    dim, partial, qk, n = 336, 72, 16, 8 * 8  # stage 2 of S4 at 256²
    with torch.device("meta"):
        layer, x = SingleHeadAttention(dim, partial, qk).eval(), torch.empty(1, 8, 8, dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    expected = n * n * (qk + partial) + n * partial * (2 * qk + partial) + n * dim * dim
    assert counter.get_total_flops() / 2 == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("shvit-s1", 6_330_808), ("shvit-s2", 11_483_072), ("shvit-s3", 14_245_273), ("shvit-s4", 16_588_484)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    assert millions(name) * 1e6 == pytest.approx(parameters, abs=0.5)


@pytest.mark.parametrize(("name", "size", "published"), [("shvit-s1", 224, 0.241), ("shvit-s4", 256, 0.986)])
def test_published_costs(name: str, size: int, published: float) -> None:
    assert gigamacs(name, size) == pytest.approx(published, rel=0.01)


def small(**config: object) -> torch.nn.Module:
    model = regard.create(
        "shvit", num_classes=3, in_chans=2, dims=(8, 12), depths=(1, 2), partial_dims=(4, 5), qk_dim=4,
        attention=(False, True), **config,
    )  # fmt: skip
    return randomised(model)


@pytest.mark.parametrize("distillation", [False, True])
def test_folded_batch_norms_leave_the_logits(distillation: bool) -> None:
    model = small(distillation=distillation)
    images = torch.randn(2, 2, 50, 33)
    want = model(images)
    fused = model.fuse()
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    torch.testing.assert_close(fused(images), want, atol=1e-5 * want.abs().max().item(), rtol=0)
    torch.testing.assert_close(fused.fuse()(images), fused(images))


def test_two_heads() -> None:
    model = small(distillation=True)
    images = torch.randn(2, 2, 32, 32)
    pooled = model.forward_features(images)[-1].mean((1, 2))
    torch.testing.assert_close(model(images), (model.head(pooled) + model.head_dist(pooled)) / 2)
    both = model.train()(images)
    assert [tuple(logits.shape) for logits in both] == [(2, 3), (2, 3)]
    assert not both[0].equal(both[1])


def test_blocks_start_as_the_identity() -> None:
    torch.manual_seed(0)
    model = regard.create("shvit", dims=(8, 12), depths=(1, 2), partial_dims=(4, 5), attention=(True, True)).eval()
    x = torch.randn(1, 3, 3, 12)
    torch.testing.assert_close(model.stages[1](x), x)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="partial_dim"):
        SingleHeadAttention(8, 9)
    with pytest.raises(ArgumentError, match="qk_dim"):
        SingleHeadAttention(8, 4, qk_dim=0)
    with pytest.raises(ShapeError, match="x: expected"):
        SingleHeadAttention(8, 4)(torch.randn(1, 4, 8))
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("shvit", depths=(1, 1))
    with pytest.raises(ArgumentError, match="dims"):
        regard.create("shvit", dims=(4, 8, 8))
    with pytest.raises(Unsupported, match="down_ops"):
        regard.from_official("shvit", {}, down_ops=[["subsample", 2], [""], [""]])
    with pytest.raises(ArgumentError, match="types"):
        regard.from_official("shvit", {}, types=["s", "s", "x"])
