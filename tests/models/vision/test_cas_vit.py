"""CAS-ViT: additive attention against its definition, its gates, sizes and cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.grid.additive import AdditiveTokenMixer
from tests.models.vision.counts import millions


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0, 0.5)
    return module.eval()


def depthwise(conv: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    """(H, W, C), by the sum over neighbours."""
    height, width, _ = z.shape
    out = conv.bias.expand_as(z).clone()
    for y in range(height):
        for x in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        out[y, x] += conv.weight[:, 0, dy + 1, dx + 1] * z[y + dy, x + dx]
    return out


def gated(gate: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    local = depthwise(gate.conv, z)
    local = (local - gate.bn.running_mean) / (gate.bn.running_var + 1e-5).sqrt() * gate.bn.weight + gate.bn.bias
    z = z / (1 + (-(local.clamp(min=0) @ gate.spatial.weight.T)).exp())
    return z / (1 + (-(gate.channel.weight @ z.mean((0, 1)))).exp())


@pytest.mark.parametrize(("height", "width", "bias"), [(3, 5, False), (1, 1, True), (2, 1, True)])
def test_it_is_its_definition(height: int, width: int, bias: bool) -> None:
    layer = randomised(AdditiveTokenMixer(4, bias)).double()
    x = torch.randn(2, height, width, 4, dtype=torch.float64)
    for image, got in zip(x, layer(x), strict=True):
        q, k, v = (image @ layer.qkv.weight.T + (layer.qkv.bias if bias else 0)).chunk(3, -1)
        mixed = depthwise(layer.mix, gated(layer.q_gate, q) + gated(layer.k_gate, k)) * v
        torch.testing.assert_close(got, depthwise(layer.proj, mixed))


def test_gradients() -> None:
    layer = randomised(AdditiveTokenMixer(3)).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_queries_and_keys_may_change_places() -> None:
    layer = randomised(AdditiveTokenMixer(4))
    x = torch.randn(1, 5, 4, 4)
    want = layer(x)
    layer.q_gate, layer.k_gate = layer.k_gate, layer.q_gate
    assert not torch.allclose(layer(x), want, atol=1e-3)
    q, k, v = layer.qkv.weight.data.chunk(3)
    layer.qkv.weight.data = torch.cat([k, q, v])
    torch.testing.assert_close(layer(x), want)


def test_open_gates_leave_convolutions() -> None:
    layer = randomised(AdditiveTokenMixer(4, qkv_bias=True))
    x = torch.randn(1, 5, 4, 4)
    with torch.no_grad():
        for gate in (layer.q_gate, layer.k_gate):
            gate.bn.weight.zero_()
            gate.bn.bias.fill_(1)
            gate.spatial.weight.fill_(1e3)
            gate.channel.weight.zero_()  # σ(0) = 1/2 of everything
    q, k, v = layer.qkv(x).chunk(3, -1)
    torch.testing.assert_close(layer(x), layer.proj(layer.mix((q + k) / 2) * v))


def test_gates_are_those_of_the_output() -> None:
    layer = randomised(AdditiveTokenMixer(4))
    x = torch.randn(2, 3, 5, 4)
    (q_where, q_what), (k_where, k_what) = layer.gates(x)
    assert q_where.shape == (2, 3, 5, 1)
    assert q_what.shape == (2, 1, 1, 4)
    q, k, v = layer.qkv(x).chunk(3, -1)
    torch.testing.assert_close(layer(x), layer.proj(layer.mix(q * q_where * q_what + k * k_where * k_what) * v))


def test_a_token_sees_its_neighbours_and_the_mean() -> None:
    layer = randomised(AdditiveTokenMixer(4)).double()
    x = torch.randn(1, 9, 9, 4, dtype=torch.float64)
    other = x.clone()
    other[0, 0, 0] += 1
    changed = (layer(x) - layer(other)).abs().amax(-1)[0]
    assert changed[-1, -1] > 0  # through the channel gates
    with torch.no_grad():
        layer.q_gate.channel.weight.zero_()
        layer.k_gate.channel.weight.zero_()
    changed = (layer(x) - layer(other)).abs().amax(-1)[0]
    assert changed[:4, :4].all()
    assert not changed[4:].any()
    assert not changed[:, 4:].any()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24)])
def test_the_cost_is_linear_in_the_pixels(height: int, width: int) -> None:
    dim, n = 16, height * width
    with torch.device("meta"):
        layer, x = AdditiveTokenMixer(dim).eval(), torch.empty(1, height, width, dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() / 2 == 3 * dim**2 * n + 36 * dim * n + 2 * dim * n + 2 * dim**2


@pytest.mark.parametrize(
    ("name", "two_heads", "one_head"),
    [
        ("cas-vit-xs", 3_200_700, 2_979_700),
        ("cas-vit-s", 5_764_224, 5_507_224),
        ("cas-vit-m", 12_421_520, 12_036_520),
        ("cas-vit-t", 21_763_120, 21_250_120),
    ],
)
def test_published_sizes(name: str, two_heads: int, one_head: int) -> None:
    assert millions(name) * 1e6 == pytest.approx(two_heads, abs=0.5)
    assert millions(name, distillation=False) * 1e6 == pytest.approx(one_head, abs=0.5)


def small(**config: object) -> torch.nn.Module:
    return randomised(regard.create("cas-vit", num_classes=3, dims=(8, 12), depths=(1, 2), mlp_ratio=2, **config))


def test_two_heads() -> None:
    model = small()
    images = torch.randn(2, 3, 50, 33)
    pooled = model.norm(model.forward_features(images)[-1]).mean((1, 2))
    torch.testing.assert_close(model(images), (model.head(pooled) + model.head_dist(pooled)) / 2)
    both = model.train()(images)
    assert [tuple(logits.shape) for logits in both] == [(2, 3), (2, 3)]
    assert not both[0].equal(both[1])


def test_feature_maps_have_norms_of_their_own() -> None:
    model = small(features_only=True)
    images = torch.randn(1, 3, 32, 32)
    got = model(images)
    for i, norm in enumerate(model.feature_norms):
        model.feature_norms[i] = torch.nn.Identity()
        raw = model(images)[i]
        torch.testing.assert_close(got[i], torch.nn.BatchNorm2d.forward(norm, raw))


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError, match="x: expected"):
        AdditiveTokenMixer(8)(torch.randn(1, 4, 8))
    with pytest.raises(ArgumentError, match="proj_drop"):
        AdditiveTokenMixer(8, proj_drop=2)
    with pytest.raises(ArgumentError, match="depths"):
        regard.create("cas-vit", depths=(1, 1))
    with pytest.raises(ArgumentError, match="drop_rate"):
        regard.create("cas-vit", drop_rate=-1.0)
    with pytest.raises(Unsupported, match="downsamples"):
        regard.from_official("cas-vit", {}, layers=[1, 1], embed_dims=[8, 8], downsamples=[False, True])
