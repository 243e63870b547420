"""FIT: the encoder step by step, who sees whom, and the published names."""

import math

import pytest
import torch
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.models.sequence.fit import FIT
from regard.models.sequence.fit_ar import FITAR
from regard.models.sequence.fit_denoiser import FITDenoiser
from regard.models.sequence.fit_keras import own_name
from regard.models.sequence.fit_layers import grid_code, parse_layers

SMALL = {
    "num_tokens": 12,
    "num_groups": 3,
    "latents_per_group": 2,
    "dim": 8,
    "latent_dim": 12,
    "num_heads": 2,
    "latent_num_heads": 3,
    "mlp_ratio": 2,
}


def build(cls, layers: str = "(1)1(1)", **config):
    torch.manual_seed(0)
    model = cls(**{"layers": layers, **SMALL, **config}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def noise(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attend(layer, x, context):
    """(N, C) to (N, C), one query and head at a time."""
    q, k, v = layer.q_proj(x), layer.k_proj(context), layer.v_proj(context)
    d = q.shape[1] // layer.num_heads
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            part = slice(h * d, (h + 1) * d)
            weights = (k[:, part] @ q[i, part] / math.sqrt(d)).softmax(0)
            heads.append(weights @ v[:, part])
        rows.append(torch.cat(heads))
    return layer.o_proj(torch.stack(rows))


def test_the_encoder_is_its_steps() -> None:
    model = build(FIT, in_dim=5, y_dim=3)
    x, y = noise(1, 3, 4, 5), noise(1, 3, 2, 3)
    got_x, got_latents = model(x, y)

    def own(layer, t):
        t = t + attend(layer.attn, layer.norm(t), layer.norm(t))
        return t + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.mlp.norm(t))))

    def cross(layer, t, context):
        return t + attend(layer.attn, layer.norm(t), layer.context_norm(context))

    first, last = model.trunk.stages
    groups, latents = [], []
    for g in range(3):
        tokens = model.stem_norm(model.stem(x[0, g])) + model.positions.table
        group = own(first.local[0], torch.cat([model.stem_y_norm(model.stem_y(y[0, g])), tokens]))
        groups.append(group)
        latents.append(cross(first.read, model.latents.table[2 * g : 2 * g + 2], group))
    mixed = own(first.mix[0], torch.cat(latents))
    for g in range(3):
        want = model.norm(own(last.local[0], cross(first.write, groups[g], mixed[2 * g : 2 * g + 2])))
        torch.testing.assert_close(got_x[0, g], want)
    torch.testing.assert_close(got_latents[0].flatten(0, 1), model.latent_norm(mixed))


def test_gradients() -> None:
    model = build(FIT, in_dim=2, num_tokens=6)
    x = noise(1, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(model, (x,))


@pytest.mark.parametrize("layers", ["(1)1(1)", "(1)2(1)1(1)"])
@pytest.mark.parametrize("shared", [True, False])
def test_no_token_is_predicted_from_later_ones_within_and_across_groups(layers: str, shared: bool) -> None:
    model = build(FITAR, layers, vocab_size=7, shared_embedding=shared)
    ids = torch.arange(12).reshape(1, 3, 4) % 7
    before = model(ids).flatten(1, 2)
    for place in range(12):
        other = ids.clone().flatten(1)
        other[0, place] = (other[0, place] + 1) % 7
        after = model(other.reshape(1, 3, 4)).flatten(1, 2)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-12, rtol=0)
        changed = (after != before).any(-1)[0]
        assert changed[place : place // 4 * 4 + 4].all()  # the rest of its own group
        assert changed[place // 4 * 4 + 4 :].all()  # and, through latents, the groups after it


def test_local_layers_alone_stay_in_their_group() -> None:
    x = noise(1, 3, 4, 5)
    other = x.clone()
    other[0, 0, 0] += 1
    for layers, reaches in (("(2)", False), ("(1)1(1)", True)):
        model = build(FIT, layers, in_dim=5)
        same = torch.equal(model(x)[0][0, 1:], model(other)[0][0, 1:])
        assert same != reaches


def test_latents_learn_to_carry_a_bit_to_another_group_which_local_layers_cannot() -> None:
    def accuracy(layers: str) -> float:
        torch.manual_seed(0)
        model, head = FIT(layers, 8, 2, 2, 16, 16, 2, 2, in_dim=1, mlp_ratio=2), torch.nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 5e-3)
        for step in range(121):
            x = torch.randint(2, (512 if step == 120 else 64, 2, 4, 1)).float()
            bit, logit = x[:, 0, 1, 0], head(model(x)[0][:, 1, 0])[:, 0]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logit, bit).backward()
            optimizer.step()
        return ((logit > 0) == (bit > 0)).float().mean().item()

    assert accuracy("(1)1(1)") > 0.95
    assert accuracy("(4)") < 0.6


def test_a_causal_mask_hides_later_groups_from_latents() -> None:
    x = noise(1, 3, 4, 5)
    other = x.clone()
    other[0, 2] += 1
    for mask, same in (("causal", True), ("none", False)):
        model = build(FIT, in_dim=5, mask=mask)
        assert torch.allclose(model(x)[1][0, :2], model(other)[1][0, :2], atol=1e-12) == same


def test_the_denoiser_reads_time_condition_and_its_latents_before() -> None:
    model = build(FITDenoiser, in_dim=4, out_dim=5, cond_dim=7, self_cond="latent", cross_mlp=True, num_features=1)
    x, cond, before = noise(2, 3, 4, 4), noise(2, 7), noise(2, 3, 2, 12)
    time = torch.tensor([[0.2, 1.0], [0.7, 2.0]], dtype=torch.float64)
    out, latents = model(x, time, cond, before)
    assert out.shape == (2, 3, 4, 5)
    assert latents.shape == (2, 3, 2, 12)
    for changed in ((x + 1, time, cond, before), (x, time * 1.1, cond, before), (x, time, cond * 2, before)):
        assert not torch.allclose(model(*changed)[0], out)
    assert not torch.allclose(model(x, time, cond)[0], out)
    torch.testing.assert_close(model(x, time, cond)[0], model(x, time, cond, torch.zeros_like(before))[0])
    torch.testing.assert_close(model(x, time, cond[:, None], before)[0], out)


def test_a_new_denoiser_ignores_the_latents_before() -> None:
    """The norm after them begins with a gain of 0."""
    torch.manual_seed(0)
    model = FITDenoiser("(1)1(1)", **SMALL, in_dim=4, out_dim=5, self_cond="latent", local_attention=False)
    x, time, cond = torch.randn(2, 3, 4, 4), torch.rand(2), torch.randn(2, 3, 12)
    assert torch.equal(model(x, time, cond, torch.randn(2, 3, 2, 12))[0], model(x, time, cond)[0])


def test_codes_of_positions() -> None:
    line = grid_code(3, 1, 4)
    want = [[f(p / 10000 ** (i / 2)) for f in (math.sin, math.cos) for i in (0, 1)] for p in (0.0, 500.0, 1000.0)]
    torch.testing.assert_close(line, torch.tensor(want), atol=1e-4, rtol=0)
    grid = grid_code(3, 2, 8).unflatten(0, (3, 2))
    torch.testing.assert_close(grid[:, 1, :4], line)
    torch.testing.assert_close(grid[2, :, 4:], grid_code(2, 1, 4))
    square = build(FIT, in_dim=5, positions="sin_cos2d")  # groups of 4 tokens
    torch.testing.assert_close(square.positions.table.float(), grid_code(2, 2, 8))


def test_attention_costs_least_where_groups_grow_with_the_cube_root() -> None:
    """Local L n, global (t m)² and cross 2 L m scores; the best n is near (2 m² L)^⅓, the sum near L^(4/3)."""

    def scores(length: int, n: int, m: int = 4) -> float:
        return length * n + (length / n * m) ** 2 + 2 * length * m

    best = {length: min(range(1, length), key=lambda n: scores(length, n)) for length in (10**4, 8 * 10**4)}
    for length, n in best.items():
        assert n == pytest.approx((2 * 16 * length) ** (1 / 3), rel=0.02)
    small, large = (scores(length, n) for length, n in best.items())
    assert math.log(large / small, 8) == pytest.approx(4 / 3, abs=0.03)


def test_names() -> None:
    assert own_name("x_network_1/transformer_encoder/mha/ln/gamma") == "trunk.stages.1.local.0.norm.weight"
    assert own_name("l_network/transformer_encoder_3/mlp/ffn/ln/beta") == "trunk.stages.0.mix.3.mlp.norm.bias"
    assert own_name("x2l_cross_attn_2/cross_mha/enc_ln/gamma") == "trunk.stages.2.write.context_norm.weight"
    assert own_name("time_emb/dense0/kernel") == "time.fc0.weight"
    assert own_name("latent_pos_emb/kernel/vis_pos_embedding") == "latents.table"


def test_layers() -> None:
    assert parse_layers("(2)4(10)") == [(2, 4), (10, 0)]
    assert parse_layers("(2)4(0)1") == [(2, 4), (0, 1)]
    assert parse_layers("(4)") == [(4, 0)]


@pytest.mark.parametrize("layers", ["", "2(1)", "(1)(2)", "(1)0(2)", "(a)"])
def test_layers_that_do_not_read(layers: str) -> None:
    with pytest.raises(ArgumentError, match="layers: "):
        parse_layers(layers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_groups": 5}, "num_groups: 5"),
        ({"latents_per_group": 0}, "latents_per_group"),
        ({"mask": "future"}, "mask: expected"),
        ({"positions": "none"}, "positions: expected"),
        ({"positions": "sin_cos2d", "num_tokens": 9}, "positions: sin_cos2d"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        FIT(**{"layers": "(1)1(1)", **SMALL, "in_dim": 5, **config})


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match="x: expected"):
        build(FIT, in_dim=5)(noise(1, 3, 4, 4))
    with pytest.raises(ArgumentError, match="y: built without"):
        build(FIT, in_dim=5)(noise(1, 3, 4, 5), noise(1, 3, 2, 3))
    with pytest.raises(ShapeError, match="ids: expected"):
        build(FITAR, vocab_size=5)(torch.zeros(1, 4, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="self_cond: expected"):
        build(FITDenoiser, in_dim=4, out_dim=5, self_cond="both")
