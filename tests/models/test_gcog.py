"""Readers of rules and scenes: each against its equations token by token, padding, and refusals."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError
from regard.models.multimodal.gcog import (
    DoubleStream,
    LatentCrossAttention,
    PerceiverReader,
    RuleQueriesStimulus,
    SingleStream,
)
from regard.tasks.gcog import GCog, collate

TWO = (DoubleStream, RuleQueriesStimulus, LatentCrossAttention, PerceiverReader)
ALL = (SingleStream, *TWO)
SMALL = {"dim": 8, "num_heads": 2, "num_classes": 7, "max_rule_length": 6, "max_stim_length": 5}


def build(cls, **config):
    torch.manual_seed(0)
    wide = {} if cls is SingleStream else {"hidden_dim": 12}
    model = cls(**SMALL, **wide, **config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def inputs(rules: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, c, dtype=torch.float64, generator=g) for n, c in ((rules, 8), (5, 3)))


def attend(layer, x: Tensor, context: Tensor) -> Tensor:
    """(N, C) to (N, C), one query and head at a time."""
    q, k, v = layer.q_proj(x), layer.k_proj(context), layer.v_proj(context)
    d = q.shape[1] // layer.num_heads
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            part = slice(h * d, (h + 1) * d)
            heads.append((k[:, part] @ q[i, part] / math.sqrt(d)).softmax(0) @ v[:, part])
        rows.append(torch.cat(heads))
    return layer.o_proj(torch.stack(rows))


def attend_relatively(layer, x: Tensor) -> Tensor:
    """Causal, with the table's last row for distance 0."""
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    d = q.shape[1] // layer.num_heads
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            part = slice(h * d, (h + 1) * d)
            scores = [q[i, part] @ (k[j, part] + layer.relative[-1 - (i - j)]) / math.sqrt(d) for j in range(i + 1)]
            heads.append(torch.stack(scores).softmax(0) @ v[: i + 1, part])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def block(module, x: Tensor, relative: bool, act, places=None) -> Tensor:
    x = module.embed(x)
    if not relative:
        for i in range(len(x)):
            for c in range(0, x.shape[1], 2):
                angle = (i if places is None else places[i]) / 10000 ** (c / x.shape[1])
                x = x + torch.zeros_like(x).index_put(
                    (torch.tensor([i, i]), torch.tensor([c, c + 1])), x.new_tensor([math.sin(angle), math.cos(angle)])
                )
    a = module.norm1((attend_relatively(module.attn, x) if relative else attend(module.attn, x, x)) + x)
    return module.norm2(act(module.mlp.fc2(act(module.mlp.fc1(a)))) + a)


def expected(model, rule: Tensor, stim: Tensor, relative: bool, places=None) -> Tensor:
    """Log-probabilities of one pair; places are the scene's positions, all of them by default."""
    if isinstance(model, SingleStream):
        x = torch.zeros(len(rule) + len(stim), 11, dtype=rule.dtype)
        x[: len(rule), :8], x[len(rule) :, 8:] = rule, stim
        x = model.embed(x)
        both = None if places is None else [*range(len(rule)), *(len(rule) + place for place in places)]
        for one in model.blocks:
            x = block(one, x, relative, F.gelu, both)
        return model.head(x[-1]).log_softmax(-1)
    r, s = block(model.rule_block, rule, relative, F.relu), block(model.stim_block, stim, False, F.relu, places)
    if isinstance(model, DoubleStream):
        x = model.norm(F.relu(model.rule_proj(r[-1])) + F.relu(model.stim_proj(s[-1])))
        for i in (0, 2, 4):
            x = F.relu(model.fnn[i](x))
        x = model.out_norm(x)
    elif isinstance(model, RuleQueriesStimulus):
        x = model.cross_norm(attend(model.cross, r, s)) + r
        x = model.mlp_norm(F.relu(model.mlp.fc2(F.relu(model.mlp.fc1(x)))))[-1]
    elif isinstance(model, LatentCrossAttention):
        x = torch.zeros(1, 12, dtype=rule.dtype)
        for cross, tokens in ((model.rule_cross, r), (model.stim_cross, s)):
            x = model.cross_norm(attend(cross, x, tokens) + x)
        x = x[-1]
    else:
        z = torch.zeros(10, 12, dtype=rule.dtype)
        for name, tokens in (("rule", r), ("stim", s)):
            c = getattr(model, f"{name}_norm")(attend(getattr(model, f"{name}_cross"), z, tokens))
            z = model.latent_norm(z + c + F.relu(getattr(model, f"{name}_proj")(c)))
            z = model.latent_norm(z + attend(model.latent_attn, z, z))
        x = F.relu(model.latent_proj(z))[-1]
    return model.head(x).log_softmax(-1)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("cls", ALL)
def test_each_is_its_equations(cls, positions) -> None:
    model = build(cls, positions=positions, **({"num_blocks": 2} if cls is SingleStream else {}))
    rule, stim = inputs()
    with torch.no_grad():
        got = model(rule, stim)
        want = torch.stack([expected(model, r, s, positions == "relative") for r, s in zip(rule, stim, strict=True)])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(rule, stim[..., None]), got)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("cls", ALL)
def test_padding_changes_nothing(cls, positions) -> None:
    model = build(cls, positions=positions)
    rule, stim = inputs(3)
    alone = model(rule[:1], stim[:1])
    padded = torch.cat([rule, torch.zeros(2, 2, 8, dtype=rule.dtype)], 1)
    padded[1, 3:] = 1.0  # the other rule is longer
    torch.testing.assert_close(model(padded, stim)[:1], alone)
    before = torch.cat([torch.zeros(2, 2, 8, dtype=rule.dtype), rule], 1)
    torch.testing.assert_close(model(before, stim)[:1], alone)
    model.pad = "right"  # as published, where the last row is read whatever it is
    assert (model(padded, stim)[:1] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("cls", ALL)
def test_empty_cells_can_be_left_out(cls) -> None:
    model = build(cls, skip_empty=True)
    rule, stim = inputs()
    full = model(rule, stim)
    model.skip_empty = False
    torch.testing.assert_close(model(rule, stim), full)  # without empty cells there is no difference
    model.skip_empty = True
    stim[0, [0, 3]] = 0
    stim[1, 1] = 0
    with torch.no_grad():
        got = model(rule, stim)
        for i, places in enumerate(([1, 2, 4], [0, 2, 3, 4])):
            want = expected(model, rule[i], stim[i, places], False, places)
            torch.testing.assert_close(got[i], want, atol=1e-6, rtol=0)


def test_latents_that_begin_alike_stay_alike() -> None:
    model = build(PerceiverReader)
    ten = model(*inputs())
    model.num_latents = 1
    torch.testing.assert_close(model(*inputs()), ten)


def test_dropout_is_of_training_only() -> None:
    for cls in ALL:
        model = build(cls, dropout=0.5)
        assert torch.equal(model(*inputs()), model(*inputs()))
        model.train()
        assert not torch.equal(model(*inputs()), model(*inputs()))


def test_sizes() -> None:
    assert all(sum(p.numel() for p in cls().parameters()) < 3e6 for cls in ALL)


def test_a_batch_of_programs_is_read() -> None:
    batch = collate([GCog().trial(0), GCog(depth=3).trial(0)])
    for cls in ALL:
        out = cls(dim=16)(batch.rule, batch.stim)
        torch.testing.assert_close(out.exp().sum(-1), torch.ones(2))


def test_published_weights_are_loaded_strictly() -> None:
    model = build(RuleQueriesStimulus)
    assert isinstance(regard.create("gcog/SimpleCrossAttn", dim=8), RuleQueriesStimulus)
    with pytest.raises(ArgumentError, match="missing cross"):
        regard.from_official("gcog", {"w_out.0.bias": torch.zeros(7)}, variant="SimpleCrossAttn")
    with pytest.raises(ArgumentError, match="unknown arguments"):
        type(model).from_official({}, depth=3)


def test_refusals() -> None:
    rule, stim = inputs()
    model = build(DoubleStream)
    with pytest.raises(ShapeError, match="rule: expected"):
        model(rule[..., :7], stim)
    with pytest.raises(ShapeError, match="stim: expected"):
        model(rule, stim[:1])
    with pytest.raises(ShapeError, match="at most 6"):
        model(rule.repeat(1, 2, 1), stim)
    with pytest.raises(ArgumentError, match="at least one row"):
        model(rule * 0, stim)
    for arguments, message in (
        ({"positions": "none"}, "positions: expected"),
        ({"pad": "left"}, "pad: expected"),
        ({"dim": 7, "num_heads": 1}, "even width"),
        ({"num_heads": 3}, "num_heads"),
    ):
        with pytest.raises(ArgumentError, match=message):
            DoubleStream(**{"dim": 8, **arguments})
    with pytest.raises(ArgumentError, match="num_blocks"):
        SingleStream(dim=8, num_blocks=0)
