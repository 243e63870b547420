"""SinkLoRA's groups against their definition in plain loops, and what the released roll does."""

import pytest
import torch

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers.lora import merge_lora
from regard.mechanisms.sparse.sink_lora import (
    ShiftedGroupAttention,
    group_mask,
    rolled_group_attention,
    sinklora_finetune,
)
from regard.models.language import LanguageModel


def module(**config) -> ShiftedGroupAttention:
    torch.manual_seed(0)
    return ShiftedGroupAttention(**{"dim": 16, "num_heads": 4, "group_size": 4, **config})


@pytest.mark.parametrize(("shifted", "sinks"), [(0, 0), (1, 4), (2, 0), (2, 3)])
def test_the_mask_is_its_definition(shifted: int, sinks: int) -> None:
    got = group_mask(4, 6, shifted, sinks).dense(20, 20).expand(1, 4, 20, 20)
    for h in range(4):
        offset = 3 if h >= 4 - shifted else 0
        for i in range(20):
            for j in range(20):
                near = (i + offset) // 6 == (j + offset) // 6
                assert got[0, h, i, j] == (j <= i and (near or j < sinks))


@pytest.mark.parametrize(("ratio", "shifted"), [(0.0, 2), (0.5, 1), (1.0, 0)])
def test_heads_are_put_back_by_ratio(ratio: float, shifted: int) -> None:
    assert module(return_ratio=ratio).shifted_heads == shifted


def test_groups_are_for_training_only() -> None:
    layer = module(num_sinks=0)
    x = torch.randn(2, 12, 16)
    q, k, v = layer.qkv(x)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer.eval()(x), layer.o_proj(full.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)
    mask = group_mask(4, 4, layer.shifted_heads, 0).dense(12, 12)
    grouped = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(layer.train()(x), layer.o_proj(grouped.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


def test_all_heads_back_is_block_diagonal_attention() -> None:
    layer = module(num_sinks=0, return_ratio=1.0).train()
    x = torch.randn(2, 12, 16)
    pieces = torch.cat([layer.eval()(piece) for piece in x.split(4, dim=1)], 1)
    torch.testing.assert_close(layer.train()(x), pieces, atol=1e-6, rtol=1e-5)


def test_training_sees_no_future_but_the_released_roll_does() -> None:
    x = torch.randn(1, 16, 16)
    other = x.clone()
    other[:, -1] += 1.0
    legitimate = module().train()
    torch.testing.assert_close(legitimate(other)[:, :-1], legitimate(x)[:, :-1], atol=0, rtol=0)
    rolled = module(leaky=True, num_sinks=0, return_ratio=0.0).train()
    assert not torch.allclose(rolled(other)[:, :2], rolled(x)[:, :2])


def test_away_from_the_wrap_the_roll_is_the_mask() -> None:
    q, k, v = (torch.randn(2, 4, 16, 3, dtype=torch.float64) for _ in range(3))
    rolled = rolled_group_attention(q, k, v, 4, 2)
    masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, group_mask(4, 4, 2, 0).dense(16, 16))
    torch.testing.assert_close(rolled[:, :, 2:], masked[:, :, 2:])


def test_information_crosses_groups_in_two_layers() -> None:
    mask = group_mask(2, 4, 1, 0).dense(16, 16).view(-1, 16, 16).any(0)
    twice = (mask.int() @ mask.int()) > 0
    assert twice[7, 2]  # through a shifted group
    assert not mask[7, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 5}, "group_size: expected an even number"),
        ({"leaky": True}, "num_sinks"),
        ({"return_ratio": 1.5}, "return_ratio"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"rope_factor": 0.0}, "rope_factor"),
    ],
)
def test_bad_arguments(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        module(**config)


def test_the_roll_needs_groups_that_divide() -> None:
    with pytest.raises(ShapeError, match="must divide"):
        module(leaky=True, num_sinks=0).train()(torch.randn(1, 10, 16))


def language_model(**config) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**{"vocab_size": 11, "dim": 16, "depth": 2, "num_kv_heads": 2, **config})


def test_finetuning_trains_low_rank_changes_norms_and_embeddings() -> None:
    model = language_model(tie_embeddings=False)
    norms, embeddings = 5 * 16, 11 * 16
    for train_norms, more in ((True, norms + embeddings), (False, 0)):
        tuned = sinklora_finetune(language_model(tie_embeddings=False), rank=3, train_norms=train_norms)
        trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        square, narrow = 3 * (16 + 16), 3 * (16 + 8)  # q and o; k and v of half the heads
        assert trainable == 2 * (2 * square + 2 * narrow) + more
        frozen = sum(p.numel() for p in tuned.parameters()) - trainable
        assert frozen == sum(p.numel() for p in model.parameters()) - more


def test_finetuning_begins_as_the_model_and_ends_in_its_weights() -> None:
    model, ids = language_model(), torch.randint(11, (2, 16))
    want = model.eval()(ids)
    torch.manual_seed(1)
    tuned = sinklora_finetune(model, rank=2, group_size=4, num_sinks=1)
    assert tuned is model
    torch.testing.assert_close(tuned(ids), want)
    assert not torch.allclose(tuned.train()(ids), want)  # groups of four
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves what was zero, the second the rest
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(tuned(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora" in name or "norm" in name or "embedding" in name}
    want = tuned.eval()(ids)
    merge_lora(tuned)
    plain = language_model().eval()
    plain.load_state_dict(tuned.state_dict())
    torch.testing.assert_close(plain(ids), want)


def test_a_rope_factor_moves_tokens_together() -> None:
    near = language_model(rope_theta=50.0).eval()
    far = sinklora_finetune(language_model(rope_theta=50.0).eval(), rope_factor=2.0)
    ids = torch.randint(11, (1, 9))
    assert not torch.allclose(far(ids), near(ids))
    x = torch.randn(1, 5, 16)
    q, k, _ = far.blocks[0].mixer.qkv(x)
    near_q, near_k, _ = near.blocks[0].mixer.qkv(x, x)
    torch.testing.assert_close(q[:, :, 4], near.blocks[0].mixer.qkv(x[:, 4:], x[:, 4:], 2)[0][:, :, 0])
    assert not torch.allclose(k[:, :, 4], near_k[:, :, 4])
    torch.testing.assert_close(q[:, :, 0], near_q[:, :, 0])


def test_what_cannot_be_finetuned() -> None:
    with pytest.raises(ArgumentError, match="expected a module with SoftmaxAttention inside, got Linear"):
        sinklora_finetune(torch.nn.Linear(2, 2))
    for config in ({"mixers": ("softmax", {"window_size": 4})}, {"mixers": ("softmax", {"qk_norm": True})}):
        with pytest.raises(Unsupported, match="cannot be grouped"):
            sinklora_finetune(language_model(**config))
