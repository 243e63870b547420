"""DuoFormer's tokens and head against loops over patches, what they are blind to, and a task that needs both halves."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms import softmax
from regard.mechanisms.grid.multi_scale import (
    DuoFormerHead,
    PatchAttention,
    ScaleBlock,
    multi_scale_tokens,
    patch_tokens,
    tokens_per_patch,
)

TINY = {"dim": 4, "depth": 2, "num_heads": 2, "scales": 2, "num_patches": 3, "mlp_ratio": 2, "num_classes": 5}


def head(**changes) -> DuoFormerHead:
    torch.manual_seed(0)
    module = DuoFormerHead(**{**TINY, **changes}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("order", ["official", "rows"])
def test_a_patch_has_its_pixels_of_every_stage(order) -> None:
    torch.manual_seed(0)
    h, w = 2, 3
    maps = {f: torch.randn(2, f * h, f * w, 4) for f in (8, 4, 2, 1)}
    got = multi_scale_tokens([maps[f] for f in (8, 4, 2, 1)], (h, w), order)
    assert got.shape == (2, 6, tokens_per_patch(4), 4) == (2, 6, 85, 4)
    for r in range(h):
        for c in range(w):
            want = [maps[1][:, r, c]]
            if order == "official":
                want += [maps[2][:, 2 * r + i, 2 * c + j] for j in range(2) for i in range(2)]
            else:
                want += [maps[2][:, 2 * r + i, 2 * c + j] for i in range(2) for j in range(2)]
            want += [maps[f][:, f * r + i, f * c + j] for f in (4, 8) for i in range(f) for j in range(f)]
            assert torch.equal(got[:, r * w + c], torch.stack(want, 1))


def test_maps_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"same multiple of 2 x 2 \(grid\)"):
        patch_tokens(torch.randn(1, 4, 6, 3), (2, 2))
    with pytest.raises(ShapeError, match="same multiple"):
        patch_tokens(torch.randn(1, 1, 1, 3), (2, 2))
    with pytest.raises(ShapeError, match="feature"):
        patch_tokens(torch.randn(4, 6, 3), (2, 2))
    with pytest.raises(ShapeError, match="finest first"):
        multi_scale_tokens([torch.randn(1, 2, 2, 3), torch.randn(1, 4, 4, 3)], (2, 2))
    with pytest.raises(ArgumentError, match="order"):
        patch_tokens(torch.randn(1, 2, 2, 3), (2, 2), "columns")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="scales"):
        tokens_per_patch(0)


def naive_attention(layer: PatchAttention, x: Tensor) -> Tensor:
    """(N, C), query by query."""
    d = x.shape[1] // layer.num_heads
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            own = slice(h * d, (h + 1) * d)
            q = layer.q_proj(x[i])[own]
            weights = torch.stack([q @ layer.k_proj(y)[own] for y in x]).div(d**0.5).softmax(0)
            heads.append(sum(a * layer.v_proj(y)[own] for a, y in zip(weights, x, strict=True)))
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def naive_block(block: ScaleBlock, x: Tensor) -> Tensor:
    gamma1, gamma2 = (getattr(ls, "gamma", torch.ones(())) for ls in (block.ls1, block.ls2))
    x = x + gamma1 * naive_attention(block.attn, norm(block.norm1, x))
    return x + gamma2 * block.mlp.fc2(F.gelu(block.mlp.fc1(norm(block.norm2, x))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_values": 0.5, "qkv_bias": False},
        {"patch_block": "transformer", "final_norm": True},
        {"scales": 1, "depth": 1},
        {"num_tokens": 4},
    ],
)
def test_the_head_is_its_definition(changes) -> None:
    module = head(**changes)
    tokens = torch.randn(2, 3, module.num_tokens, 4, dtype=torch.float64)
    for image, got in zip(tokens, module(tokens), strict=True):
        gathered = []
        for patch in image:
            x = patch + module.pos_embed_for_scale[0, 0]
            for block in module.scale_blocks:
                x = naive_block(block, x)
            gathered.append(x[0])
        z = torch.stack([module.cls_token[0, 0], *gathered]) + module.pos_embed[0]
        for layer in module.patch_blocks:
            z = naive_block(layer, z) if isinstance(layer, ScaleBlock) else naive_attention(layer, z)
        last = norm(module.norm, z[0]) if changes.get("final_norm") else z[0]
        close(got, module.head(last))


def test_gradients() -> None:
    module = head()
    tokens = torch.randn(1, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (tokens,))
    module(tokens).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_tokens_of_a_patch_may_change_places_with_their_positions() -> None:
    module, tokens = head(), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    want, order = module(tokens), [0, 4, 2, 5, 1, 3]
    assert not torch.allclose(module(tokens[:, :, order]), want, atol=1e-4)
    module.pos_embed_for_scale.data = module.pos_embed_for_scale.data[:, :, order]
    close(module(tokens[:, :, order]), want)


def test_patches_reach_the_class_token_through_patch_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = head(num_patches=4)  # 1 + 4 tokens in the second attention, 6 in the first
    real = softmax.attention
    tokens, other = (torch.randn(1, 4, 6, 4, dtype=torch.float64) for _ in range(2))
    assert not torch.allclose(module(tokens), module(other), atol=1e-4)

    def diagonal(q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
        return v if q.shape[2] == 5 else real(q, k, v, **settings)

    monkeypatch.setattr(softmax, "attention", diagonal)
    close(module(tokens), module(other))


@pytest.mark.parametrize(("scales", "pairs"), [(2, 49 * 6**2), (4, 362_404)])
def test_the_pairs_are_those_inside_patches_and_between_them(scales, pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        counted.append(q.shape[0] * q.shape[2] * k.shape[2])
        return v

    monkeypatch.setattr(softmax, "attention", spy)
    module = DuoFormerHead(4, 1, 2, scales, mlp_ratio=1, num_classes=2)
    module(torch.randn(1, 49, module.num_tokens, 4))
    assert counted == [pairs, 50**2]
    assert (49 * module.num_tokens) ** 2 == 49 * pairs  # what one attention between all of them would have


def test_texture_and_layout_need_the_fine_stages() -> None:
    """Four patches, one striped across the others: stripes average to zero, only the finest stage has their edges."""
    stripes = torch.tensor([1.0, -1.0]).repeat(2)[:, None].expand(4, 4)

    def accuracy(scales: int) -> float:
        torch.manual_seed(0)
        project = nn.Linear(2, 16)
        module = DuoFormerHead(16, 1, 2, scales, 4, 2.0, num_classes=4)
        module.pos_embed.data.normal_()  # larger than for real training, so that it is quick
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW([*project.parameters(), *module.parameters()], lr=1e-2)
        for _ in range(40):
            target = torch.randint(4, (32,))
            patches = torch.stack([torch.stack([stripes.T if p == t else stripes for p in range(4)]) for t in target])
            image = patches.view(32, 2, 2, 4, 4).transpose(2, 3).reshape(32, 8, 8)
            edges = [(image - image.roll(1, axis)).abs() for axis in (1, 2)]
            means = [F.avg_pool2d(image[:, None], f).movedim(1, -1).expand(-1, -1, -1, 2) for f in (2, 4)]
            maps = [project(x) for x in (torch.stack(edges, -1), *means)]
            tokens = multi_scale_tokens(maps[3 - scales :], (2, 2))
            logits = module(torch.cat([torch.zeros(32, 4, 1, 16), tokens], 2))
            optimizer.zero_grad()
            F.cross_entropy(logits, target).backward()
            optimizer.step()
        return (logits.argmax(-1) == target).double().mean().item()

    assert accuracy(1) < 0.6
    assert accuracy(3) > 0.9


def published(module: DuoFormerHead) -> dict[str, Tensor]:
    """The names that the published class would give to these weights."""
    state = {name: getattr(module, name).detach() for name in ("pos_embed_for_scale", "cls_token", "pos_embed")}
    state |= {f"head.{kind}": getattr(module.head, kind).detach() for kind in ("weight", "bias")}
    state |= {f"fc_norm.{kind}": torch.full((module.dim,), 0.5) for kind in ("weight", "bias")}
    for i, block in enumerate(module.scale_blocks):
        own = block.state_dict()
        for kind in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"scaleBlocks.{i}.{name}.{kind}"] = own[f"{name}.{kind}"]
        state |= {f"scaleBlocks.{i}.{ls}.gamma": own[f"{ls}.gamma"] for ls in ("ls1", "ls2") if f"{ls}.gamma" in own}
    layers = {f"scaleBlocks.{i}": block.attn for i, block in enumerate(module.scale_blocks)}
    layers |= {f"blocks.{i}": layer for i, layer in enumerate(module.patch_blocks)}
    for name, attn in layers.items():
        for kind in ("weight", "bias"):
            fused = [getattr(getattr(attn, f"{part}_proj"), kind) for part in "qkv"]
            if fused[0] is not None:
                state[f"{name}.attn.qkv.{kind}"] = torch.cat(fused).detach()
            state[f"{name}.attn.proj.{kind}"] = getattr(attn.o_proj, kind).detach()
    return state


@pytest.mark.parametrize("changes", [{}, {"scales": 4, "init_values": 0.3}, {"qkv_bias": False}, {"num_tokens": 21}])
def test_published_weights(changes) -> None:
    module = head(**changes).float()
    kwargs = {"depth": 2, "scales": 2, "num_heads": 2, "embed_dim": 4, "mlp_ratio": 2.0, "num_classes": 5}
    kwargs |= {"num_patches": 3, "norm_layer": None, "attn_drop_rate": 0.0}
    kwargs |= {name: value for name, value in changes.items() if name != "num_tokens"}
    state, tokens = published(module), torch.randn(1, 3, module.num_tokens, 4)
    torch.testing.assert_close(DuoFormerHead.from_official(state, **kwargs)(tokens), module(tokens), atol=0, rtol=0)
    normed = DuoFormerHead.from_official(state, **kwargs, final_norm=True)
    assert torch.equal(normed.norm.bias, torch.full((4,), 0.5))
    with pytest.raises(Unsupported, match="attn_drop_rate"):
        DuoFormerHead.from_official(state, **{**kwargs, "attn_drop_rate": 0.1})
    del state["blocks.1.attn.proj.weight"]
    with pytest.raises(ArgumentError, match=r"missing patch_blocks.1.o_proj.weight"):
        DuoFormerHead.from_official(state, **kwargs)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"tokens: expected \(B, 3, 6, 4\)"):
        head()(torch.randn(1, 3, 5, 4, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="patch_block"):
        head(patch_block="none")
    with pytest.raises(ArgumentError, match="depth"):
        head(depth=0)
    with pytest.raises(ArgumentError, match="num_heads"):
        head(num_heads=3)
