"""Importance of heads by pruning and attention by distance, against hand cases, loops and the untouched model."""

from functools import cache
from math import log

import pytest
import torch
from torch import nn

import regard
from regard.errors import ArgumentError, ShapeError
from regard.probes.vit_heads import (
    HeadImportance,
    Pruning,
    attention_strength,
    hop_rings,
    js_divergence,
    rank_heads,
)

LAYERS, HEADS, DIM = 3, 4, 32


def vit(heads=HEADS, head_dim=DIM // HEADS, seed=0, labels=4):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=heads, intermediate_size=64, image_size=12,
        patch_size=4, num_channels=1, num_labels=labels, head_dim=head_dim, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def toy(count, seed):
    """Which of four quarters of a noisy picture is striped downwards; each of the others is striped across."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    stripes = torch.arange(12) % 2 * 2.0 - 1
    images = stripes[:, None].expand(count, 1, 12, 12).clone()
    for quarter in range(4):
        top, left = 6 * (quarter // 2), 6 * (quarter % 2)
        images[labels == quarter, :, top : top + 6, left : left + 6] = stripes[:6].expand(6, 6)
    return images + 1.5 * torch.randn(images.shape, generator=g), labels


@cache
def trained():
    """Right about 97 of 100 times."""
    model = vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(200):
        images, labels = toy(64, 100 + step)
        loss = nn.functional.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def with_a_dead_head(model, layer):
    """The same function with a fifth head that copies head 0: in `layer` it writes nothing, elsewhere half each."""
    size = DIM // HEADS
    larger = vit(HEADS + 1, size)
    state = larger.state_dict()
    for name, tensor in model.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
        elif name.endswith("o_proj.weight"):  # (dim, heads · size)
            share = 0.0 if f"layers.{layer}." in name else 0.5
            first, others = tensor[:, :size], tensor[:, size:]
            state[name] = torch.cat([(1 - share) * first, others, share * first], 1)
        else:
            state[name] = torch.cat([tensor, tensor[:size]], 0)
    larger.load_state_dict(state)
    return larger.eval()


def naive_importance(model, images, labels, layer, head):
    """With the weights of the output projection set to zero instead of the head's output, one picture at a time."""
    size = DIM // HEADS
    projection = model.vit.layers[layer].attention.o_proj
    before = projection.weight.detach().clone()
    found = {"prob_drop": 0.0, "jsd": 0.0, "flip": 0.0}
    with torch.no_grad():
        for i in range(len(images)):
            p = model(images[i : i + 1]).logits[0].double().softmax(0)
            projection.weight[:, head * size : (head + 1) * size] = 0
            q = model(images[i : i + 1]).logits[0].double().softmax(0)
            projection.weight.copy_(before)
            c = int(p.argmax()) if labels is None else int(labels[i])
            m = (p + q) / 2
            found["prob_drop"] += float(p[c] - q[c]) / len(images)
            found["jsd"] += float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2 / len(images)
            found["flip"] += float(p.argmax() != q.argmax()) / len(images)
    return found


@pytest.mark.parametrize("labelled", [False, True])
def test_importance_is_what_pruning_costs(labelled):
    model = vit()
    images, labels = toy(6, 0)
    labels = labels if labelled else None
    seen = []
    found = HeadImportance(model, batch_size=4)(images, labels, on_progress=lambda *step: seen.append(step))
    assert seen[-1] == (LAYERS * HEADS + 1,) * 2
    assert {t.shape for t in found.values()} == {(LAYERS, HEADS)}
    for layer in range(LAYERS):
        for head in range(HEADS):
            for name, expected in naive_importance(model, images, labels, layer, head).items():
                assert found[name][layer, head].item() == pytest.approx(expected, abs=1e-6), (name, layer, head)


def test_of_timm():
    """Against the model with that head's columns of the projection set to zero."""
    from tests.timm_shim import timm

    torch.manual_seed(0)
    size = DIM // HEADS
    model = timm.models.VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, num_classes=4, embed_dim=DIM, depth=2, num_heads=HEADS
    ).eval()
    nn.init.normal_(model.head.weight)  # timm's is too small to tell anything apart
    images = toy(5, 0)[0]
    found = HeadImportance(model)(images)
    with torch.no_grad():
        full = model(images).double().softmax(-1)
        for layer in range(2):
            weight = model.blocks[layer].attn.proj.weight
            before = weight.clone()
            for head in range(HEADS):
                weight[:, head * size : (head + 1) * size] = 0
                expected = js_divergence(full, model(images).double().softmax(-1)).mean().item()
                weight.copy_(before)
                assert expected > 1e-6
                assert found["jsd"][layer, head].item() == pytest.approx(expected, rel=1e-3)


def test_as_many_forwards_as_heads_and_one():
    model, calls = vit(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    HeadImportance(model)(toy(8, 0)[0])
    assert len(calls) == LAYERS * HEADS + 1


def test_per_class_and_cosine():
    model = vit()
    images, labels = toy(8, 0)
    importance = HeadImportance(
        model, ("cosine", "flip"), output=lambda x: model.vit(pixel_values=x).last_hidden_state[:, 0]
    )
    rows = importance.per_image(images)["cosine"]
    assert rows.shape == (8, LAYERS, HEADS)
    with torch.no_grad():
        full, pruned = importance.pruned(images, []), importance.pruned(images, [(1, 2)])
        torch.testing.assert_close(full, model.vit(pixel_values=images).last_hidden_state[:, 0])
    expected = 1 - torch.cosine_similarity(full, pruned, dim=-1)
    torch.testing.assert_close(rows[:, 1, 2].float(), expected, atol=1e-6, rtol=0)
    of_one = importance(images[labels == 3])["cosine"]
    torch.testing.assert_close(rows[labels == 3].mean(0), of_one)


def test_a_head_that_writes_nothing_ranks_last():
    model = with_a_dead_head(trained(), layer=1)
    images, labels = toy(32, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, trained()(images).logits, atol=1e-5, rtol=0)
    found = HeadImportance(model)(images, labels)
    for values in found.values():
        assert values[1, HEADS] == 0
    assert rank_heads(found["jsd"])[0] == (1, HEADS)
    assert (found["jsd"] == 0).sum() == 1


def test_the_least_important_quarter_costs_least():
    model = with_a_dead_head(trained(), layer=1)
    images, labels = toy(256, 2)
    held_out, answers = toy(512, 3)
    importance = HeadImportance(model, ("jsd",), batch_size=256)
    order = rank_heads(importance(images, labels)["jsd"])
    count = len(order) // 4

    def accuracy(heads):
        return (importance.pruned(held_out, heads).argmax(-1) == answers).double().mean().item()

    g = torch.Generator().manual_seed(0)
    draws = [[order[i] for i in torch.randperm(len(order), generator=g)[:count]] for _ in range(10)]
    at_random = sum(accuracy(heads) for heads in draws) / len(draws)
    assert accuracy([]) > 0.9
    assert accuracy(order[:count]) > at_random > accuracy(order[-count:])


def test_pruning_leaves_attention_and_model_alone():
    model = vit()
    images = toy(2, 0)[0]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        plain = model(images).logits
        with regard.apply(model, Pruning()):
            torch.testing.assert_close(model(images).logits, plain, atol=1e-5, rtol=0)
        pruned = HeadImportance(model).pruned(images, [(0, 1)])
        assert (pruned - plain).abs().max() > 1e-3
        assert torch.equal(model(images).logits, plain)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_divergence():
    p, q = torch.tensor([[0.2, 0.3, 0.5], [1, 0, 0]]).double(), torch.tensor([[0.6, 0.4, 0], [0, 0.5, 0.5]]).double()
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p))
    assert js_divergence(p, p).tolist() == [0, 0]
    assert js_divergence(p, q)[1].item() == pytest.approx(log(2), abs=1e-12)
    expected = 0.0
    for a, b in zip([0.2, 0.3, 0.5], [0.6, 0.4, 0.0], strict=True):
        m = (a + b) / 2
        expected += sum(x * log(x / m) for x in (a, b) if x) / 2
    assert js_divergence(p, q)[0].item() == pytest.approx(expected)


def test_ranking_breaks_ties_by_place():
    importance = torch.tensor([[0.5, 0.0], [0.0, -1.0], [0.5, 0.0]])
    assert rank_heads(importance) == [(1, 1), (0, 1), (1, 0), (2, 1), (0, 0), (2, 0)]


def uniform(count, heads=1):
    return torch.full((1, heads, count, count), 1 / count)


def test_uniform_attention_on_three_by_three():
    corner = hop_rings(3, 3)[:, 0].sum(-1)
    assert corner.tolist() == [1, 3, 5]
    for cls in (False, True):
        found = attention_strength(uniform(9 + cls), 3, cls)
        share = 9 / (9 + cls)
        torch.testing.assert_close(found.S[0], share * torch.tensor([9, 40, 32]).double() / 81)
        assert found.mean_distance.item() == pytest.approx((40 + 64) / 81)
        per_key = attention_strength(uniform(9 + cls), 3, cls, "mean")
        torch.testing.assert_close(per_key.S[0], torch.full((3,), 1 / (9 + cls)).double())
        torch.testing.assert_close(found.ring_sizes, torch.tensor([9, 40, 32]).double() / 9)
    assert found.cls_entries["cls_cls"].item() == pytest.approx(0.1)
    assert found.cls_entries["cls_patches"].item() == pytest.approx(0.9)
    assert found.cls_entries["patches_cls"].item() == pytest.approx(0.1)
    assert found.cls_entries["patches_patches"].item() == pytest.approx(0.9)
    assert attention_strength(uniform(9), 3, False).cls_entries == {}


def test_diagonal_attention():
    found = attention_strength(torch.eye(16)[None, None], 4, cls=False)
    assert found.S.tolist() == [[1, 0, 0, 0]]
    assert found.mean_distance.item() == 0


@pytest.mark.parametrize("normalise", ["mass", "mean"])
def test_against_loops(normalise):
    torch.manual_seed(0)
    rows, columns, batch = 2, 4, 3
    maps = torch.randn(5, batch, 2, 9, 9).softmax(-1)
    found = attention_strength(maps, (rows, columns), True, normalise)
    assert found.S.shape == (5, 2, 4)
    for layer in range(5):
        for head in range(2):
            for k in range(4):
                shares = []
                for b in range(batch):
                    for i in range(8):
                        ring = [
                            j
                            for j in range(8)
                            if max(abs(i // columns - j // columns), abs(i % columns - j % columns)) == k
                        ]
                        mass = sum(float(maps[layer, b, head, 1 + i, 1 + j]) for j in ring)
                        if normalise == "mass":
                            shares.append(mass)
                        elif ring:
                            shares.append(mass / len(ring))
                expected = sum(shares) / len(shares)
                assert found.S[layer, head, k].item() == pytest.approx(expected, abs=1e-6)
    if normalise == "mass":
        total = found.S.sum(-1) + found.cls_entries["patches_cls"]
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_of_a_recording():
    model = vit()
    images = toy(2, 0)[0]
    recording = regard.record(model, {"pixel_values": images}, queries="all")
    found = attention_strength(recording, 3)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        maps = torch.stack(model(images, output_attentions=True).attentions)
    expected = attention_strength(maps, 3)
    torch.testing.assert_close(found.S, expected.S, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mean_distance, expected.mean_distance, atol=1e-5, rtol=0)
    with pytest.raises(ArgumentError, match="recording: expected the rows of all 10 queries, got"):
        attention_strength(regard.record(model, {"pixel_values": images}, queries=[0, 3]), 3)


def test_refusals():
    model, images = vit(), toy(4, 0)[0]
    with pytest.raises(ArgumentError, match="metrics: expected some of prob_drop, jsd, flip, cosine, got"):
        HeadImportance(model, ("kl",))
    with pytest.raises(ArgumentError, match="batch_size must be at least 1, got 0"):
        HeadImportance(model, batch_size=0)
    with pytest.raises(ShapeError, match=r"labels: expected \(4,\), got \(3,\)"):
        HeadImportance(model)(images, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"output: expected \(4, classes\), got \(4, 10, 32\)"):
        HeadImportance(model, output=lambda x: model.vit(pixel_values=x).last_hidden_state)(images)
    with pytest.raises(ArgumentError, match=r"heads: the model has layers 0\.\.2, got \[7\]"):
        HeadImportance(model).pruned(images, [(7, 0)])
    with pytest.raises(ArgumentError, match=r"heads: layer 1 has heads 0\.\.3, got \[4\]"):
        HeadImportance(model).pruned(images, [(1, 4)])
    with pytest.raises(ArgumentError, match="normalise must be"):
        attention_strength(uniform(9), 3, False, "sum")
    with pytest.raises(ShapeError, match=r"maps: expected \(\.\.\., B, H, 10, 10\), got \(1, 1, 9, 9\)"):
        attention_strength(uniform(9), 3)
    with pytest.raises(ArgumentError, match="grid: expected at least 1"):
        hop_rings(0, 3)
    with pytest.raises(ShapeError, match=r"importance: expected \(layers, heads\)"):
        rank_heads(torch.zeros(3))
