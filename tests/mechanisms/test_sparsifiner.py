"""Sparsifiner's predictor and pruning against their definition in loops, and what they reduce to."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.sparse.sparsifiner import SparsifinerAttention, blank
from regard.models.vision.sparsifiner import Sparsifiner, sparsifiner_loss

N, H, D = 9, 2, 6


def module(**config) -> SparsifinerAttention:
    torch.manual_seed(0)
    layer = SparsifinerAttention(**{"dim": H * D, "num_heads": H, "num_tokens": N, "reduce_n": 2, **config}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer.eval()


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, N, H * D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def left(*pruned: int) -> Tensor:
    """A token mask of two items, the second without the given patches too, and so many of the first."""
    mask = torch.ones(2, N - 1, dtype=torch.bool)
    mask[1, list(pruned)] = False
    mask[0, : len(pruned)] = False
    return mask


def naive(layer: SparsifinerAttention, x: Tensor, alive: Tensor | None, row: float | None, threshold: float | None):
    """(output, mask, approx) of every item, head, query and key in turn; ``row``: the keep rate."""
    p = layer.mask_predictor
    out, masks, maps = torch.zeros_like(x), torch.zeros(2, H, N, N, dtype=torch.bool), torch.zeros(2, H, N - 1, N)
    maps = maps.double()
    basis = (p.proj_n if p.proj_back_n is None else p.proj_back_n).T.abs().tolist()
    basis = [[u if u > p.basis_threshold else 0.0 for u in line] for line in basis]
    rank = len(basis)
    for b in range(2):
        active = [True] * N if alive is None else [True, *alive[b].tolist()]
        heads = []
        for h in range(H):
            q, k, v = (
                torch.stack(
                    [
                        (layer.qkv.weight @ x[b, i] + layer.qkv.bias)[part * H * D + h * D :][:D]
                        * (1.0 if active[i] else 0.0)
                        for i in range(N)
                    ]
                )
                for part in range(3)
            )
            small_q = [(p.proj_c_q.weight @ q[i] + p.proj_c_q.bias) * float(active[i]) for i in range(N)]
            small_k = [(p.proj_c_k.weight @ k[i] + p.proj_c_k.bias) * float(active[i]) for i in range(N)]
            masks[b, h, 0] = True
            for i in range(1, N):
                logits = [
                    sum(float(small_q[i] @ small_k[j]) * float(p.proj_n[j, r]) for j in range(N)) / math.sqrt(H)
                    for r in range(rank)
                ]
                top = max(logits)
                coef = [math.exp(value - top) for value in logits]
                coef = [c / sum(coef) for c in coef]
                if p.coef_topk is not None:
                    least = sorted(coef)[-p.coef_topk]
                    coef = [c if c >= least else 0.0 for c in coef]
                else:
                    coef = [c if c > p.coef_threshold else 0.0 for c in coef]
                line = [sum(coef[r] * basis[r][j] for r in range(rank)) for j in range(N)]
                maps[b, h, i - 1] = torch.tensor(line, dtype=torch.float64)
                candidates = [j for j in range(N) if active[j]]
                if row is not None:
                    budget = min(math.ceil(row * N), N if alive is None else sum(active) - 1)
                    chosen = sorted(candidates, key=lambda j: -line[j])[:budget]
                else:
                    chosen = [j for j in candidates if line[j] > threshold]
                if p.prune_rows and not active[i]:
                    chosen = []
                masks[b, h, i, chosen] = True
            mixed = torch.zeros(N, D, dtype=torch.float64)
            for i in range(N):
                seen = masks[b, h, i].nonzero().flatten().tolist()
                weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(D)) for j in seen]
                for j, w in zip(seen, weights, strict=True):
                    mixed[i] += w / sum(weights) * v[j]
            heads.append(mixed)
        out[b] = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
    return out, masks, maps


@pytest.mark.parametrize(
    ("config", "row", "threshold"),
    [
        ({"attn_keep_rate": 0.3}, 0.3, None),
        ({"attn_keep_rate": 0.9, "coef_topk": 2, "share_inout_proj": True}, 0.9, None),
        ({"attn_keep_rate": 0.5, "coef_threshold": 0.2, "prune_rows": True}, 0.5, None),
        ({"attn_keep_rate": None, "score_threshold": 0.45, "basis_threshold": 0.3, "coef_topk": 2}, None, 0.45),
    ],
)
@pytest.mark.parametrize("alive", [None, left(2, 5, 6)])
def test_it_is_its_definition(config: dict, row: float | None, threshold: float | None, alive: Tensor | None) -> None:
    layer, x = module(**config), tokens()
    with torch.no_grad():
        want, mask, approx = naive(layer, x, alive, row, threshold)
        got, chosen = layer.attend(x, alive)
    rows = torch.ones(2, N, dtype=torch.bool)
    if alive is not None and layer.mask_predictor.coef_topk is not None:
        rows[:, 1:] = alive  # the coefficients of a pruned token are all equal, and any are the largest
    found = chosen.connectivity
    torch.testing.assert_close(
        found.approx.transpose(1, 2)[rows[:, 1:]], approx.transpose(1, 2)[rows[:, 1:]], atol=1e-12, rtol=0
    )
    assert torch.equal(found.mask.transpose(1, 2)[rows], mask.transpose(1, 2)[rows])
    torch.testing.assert_close(got[rows], want[rows], atol=1e-10, rtol=0)
    if alive is None:
        torch.testing.assert_close(layer(x), want, atol=1e-10, rtol=0)


def test_tokens_left_may_differ_between_items() -> None:
    layer, x = module(attn_keep_rate=0.8), tokens()
    alive = left(2, 5, 6)
    alive[0] = True
    both = layer.attend(x, alive)[1].connectivity.mask
    for b in range(2):
        assert torch.equal(layer.attend(x[b : b + 1], alive[b : b + 1])[1].connectivity.mask, both[b : b + 1])
    assert both[0, :, 1:].sum(-1).eq(8).all()
    assert both[1, :, 1:].sum(-1).eq(5).all()


def test_keeping_all_is_dense_attention() -> None:
    layer, x = module(attn_keep_rate=1.0), tokens()
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(dense), atol=1e-12, rtol=0)


def test_weights_are_those_applied() -> None:
    layer, x = module(attn_keep_rate=0.4), tokens()
    y, chosen = layer.attend(x)
    v = layer.qkv(x)[..., 2 * H * D :].unflatten(-1, (H, D)).transpose(1, 2)
    torch.testing.assert_close(layer.proj((chosen.weights() @ v).transpose(1, 2).flatten(2)), y)
    assert torch.equal(chosen.weights() > 0, chosen.connectivity.mask)
    assert (chosen.dense_weights() > 0).all()


def test_a_row_that_sees_nothing_gives_zero() -> None:
    layer, x = module(attn_keep_rate=None, score_threshold=1e3), tokens()
    torch.testing.assert_close(layer(x)[:, 1:], layer.proj.bias.expand(2, N - 1, -1), atol=0, rtol=0)
    assert not torch.allclose(layer(x)[:, 0], layer.proj.bias)


def test_the_class_token_prunes_by_its_mean_attention_and_none_returns() -> None:
    layer, x = module(token_keep_rate=0.5), tokens()
    chosen = layer.attend(x)[1]
    score = chosen.weights()[:, :, 0, 1:].mean(1)
    for b in range(2):
        assert set(chosen.tokens[b].nonzero().flatten().tolist()) == set(score[b].topk(4).indices.tolist())
    again = layer.attend(x, left(0, 1, 2, 3, 4, 5))[1].tokens
    assert torch.equal(again, left(0, 1, 2, 3, 4, 5))


def test_the_predictor_learns_only_in_reconstruction_and_then_attention_is_dense() -> None:
    layer, x = module(attn_keep_rate=0.3, basis_threshold=0.2, token_keep_rate=0.5), tokens()
    assert not any(p.requires_grad for p in layer.mask_predictor.parameters())
    layer.reconstruct().train()
    y, chosen = layer.attend(x)
    torch.testing.assert_close(chosen.weights(), chosen.dense_weights(), atol=0, rtol=0)
    assert chosen.tokens is None
    assert torch.equal(chosen.connectivity.basis, layer.mask_predictor.proj_back_n.T)
    chosen.connectivity.approx.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.mask_predictor.parameters())
    assert not torch.allclose(layer.eval()(x), y)


def test_gradients() -> None:
    layer = module(attn_keep_rate=0.4)
    x = tokens().requires_grad_()
    assert torch.autograd.gradcheck(layer, x, atol=1e-6)
    layer.reconstruct().train()
    basis = layer.mask_predictor.proj_back_n
    q, k = torch.randn(2, 1, H, N, D, dtype=torch.float64)

    def approx(basis: Tensor, weight: Tensor) -> Tensor:
        given = {"proj_back_n": basis, "proj_c_q.weight": weight}
        return torch.func.functional_call(layer.mask_predictor, given, (q, k, None, True)).approx

    assert torch.autograd.gradcheck(approx, (basis, layer.mask_predictor.proj_c_q.weight))


def test_blank_spares_the_class_token() -> None:
    x = torch.ones(2, 1, N, 3)
    assert blank(x, torch.zeros(2, N - 1, dtype=torch.bool)).sum((1, 2, 3)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"reduce_n": 100}, "reduce_n"),
        ({"reduce_c": 100}, "reduce_c"),
        ({"num_tokens": 1}, "num_tokens"),
        ({"coef_topk": 5}, "coef_topk"),
        ({"attn_keep_rate": 1.5}, "attn_keep_rate"),
        ({"token_keep_rate": -0.5}, "token_keep_rate"),
        ({"score_threshold": 0.1}, "score_threshold"),
        ({"attn_keep_rate": None}, "score_threshold"),
        ({"num_heads": 5}, "num_heads"),
    ],
)
def test_bad_arguments_are_refused(config: dict, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        module(**config)


def test_bad_input_is_refused() -> None:
    layer, x = module(), tokens()
    with pytest.raises(ShapeError, match="num_tokens"):
        layer(x[:, :-1])
    with pytest.raises(ShapeError, match="tokens"):
        layer.attend(x, torch.ones(2, N, dtype=torch.bool))
    with pytest.raises(Unsupported, match="valid"):
        layer(x, valid=torch.arange(N).expand(2, N) > 2)
    torch.testing.assert_close(layer(x, valid=torch.ones(2, N, dtype=torch.bool)), layer(x))


# the vision transformer

VIT = {"img_size": (16, 8), "patch_size": 4, "num_classes": 5, "embed_dim": 12, "num_heads": 2, "reduce_n": 2}


def vit(**config) -> Sparsifiner:
    torch.manual_seed(0)
    model = Sparsifiner(**{**VIT, "depth": 4, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(2))


def test_keeping_all_is_a_dense_transformer() -> None:
    model, x = vit(attn_keep_rate=1.0), images()
    h = torch.nn.functional.conv2d(x, model.patch_embed.weight, model.patch_embed.bias, 4).flatten(2).mT
    h = torch.cat([model.cls_token.expand(2, -1, -1), h], 1) + model.pos_embed
    for block in model.blocks:
        dense = torch.nn.MultiheadAttention(12, 2, batch_first=True)
        dense.in_proj_weight, dense.in_proj_bias, dense.out_proj = *block.attn.qkv.parameters(), block.attn.proj
        y = block.norm1(h)
        h = h + dense(y, y, y, need_weights=False)[0]
        h = h + block.mlp(block.norm2(h))
    torch.testing.assert_close(model(x), model.head(model.norm(h)[:, 0]), atol=1e-5, rtol=1e-5)


def test_pruned_patches_stay_zero_and_change_nothing_but_the_class_tokens_normaliser() -> None:
    model = vit(token_keep_rate=0.6)
    out = model.forward_details(images())
    counts = [None if layer.tokens is None else layer.tokens.sum(-1).tolist() for layer in out.layers]
    assert counts == [None, [5, 5], [3, 3], [2, 2]]
    for earlier, later in zip(out.layers[1:], out.layers[2:], strict=False):
        assert (earlier.tokens | ~later.tokens).all()
        seen = later.connectivity.mask[:, :, 1:, 1:].any((1, 2))
        assert (earlier.tokens | ~seen).all()
    torch.testing.assert_close(out.features[~out.layers[-1].tokens], model.norm.bias.expand(12, -1))


def test_dropout_is_for_training() -> None:
    model, without = vit(drop_rate=0.5), vit()
    torch.testing.assert_close(model(images()), without(images()), atol=0, rtol=0)
    assert not torch.allclose(model.train()(images()), without(images()))


def test_sizes_and_arguments() -> None:
    assert regard.create("sparsifiner-tiny", depth=1, num_classes=2).blocks[0].attn.qkv.weight.shape == (576, 192)
    assert vit(num_classes=0)(images()).shape == (2, 12)
    assert vit(representation_size=7).head.weight.shape == (5, 7)
    with pytest.raises(ArgumentError, match="attn_keep_rate"):
        vit(attn_keep_rate=[0.5])
    with pytest.raises(ArgumentError, match="patch_size"):
        vit(patch_size=20)
    with pytest.raises(ShapeError, match="images"):
        vit()(images().mT)


def test_published_arguments_that_mean_nothing_here_are_refused() -> None:
    state = vit().state_dict()
    spar = {"cfg.SPAR": {"SCORE_USE_TOPK": True}}
    with pytest.raises(ArgumentError, match="colour"):
        Sparsifiner.from_official(state, colour=1, **spar)
    with pytest.raises(Unsupported, match="hybrid_backbone"):
        Sparsifiner.from_official(state, hybrid_backbone=torch.nn.Identity(), **spar)
    with pytest.raises(Unsupported, match=r"cfg\.SPAR"):
        Sparsifiner.from_official(state)


def test_published_attention_is_the_layer() -> None:
    layer = module(attn_keep_rate=0.4, share_inout_proj=True).float()
    state = layer.state_dict() | {"mask_predictor.proj_back_n": layer.mask_predictor.proj_n.detach()}
    again = regard.from_official(
        "sparsifiner",
        state,
        **{"dim": 12, "num_heads": 2, "num_tokens": N, "attn_keep_rate": 0.4, "reduce_n_factor": 2, "qkv_bias": True},
        **{"share_inout_proj": True, "cfg.SPAR": {"SCORE_USE_TOPK": True}},
    )
    x = tokens().float()
    torch.testing.assert_close(again(x), layer(x), atol=0, rtol=0)


def test_losses_are_their_definitions() -> None:
    student = vit(token_keep_rate=0.6).reconstruct(False)
    for block in student.blocks:
        block.attn.mask_predictor.requires_grad_(True)
    out = student.forward_details(images())
    dense = vit(attn_keep_rate=1.0, depth=4)
    teacher = dense.forward_details(images() * 0.9)
    labels = torch.tensor([3, 1])
    weights = {"distillation": 2.0, "token_distillation": 3.0, "reconstruction": 0.5, "self_distillation": 0.25}
    parts = sparsifiner_loss(out, labels, teacher, classification=1.5, **weights)
    p, q = out.logits.softmax(-1), teacher.logits.softmax(-1)
    alive = out.layers[-1].tokens.unsqueeze(-1)
    torch.testing.assert_close(parts["classification"], -1.5 * (p[0, 3].log() + p[1, 1].log()) / 2)
    torch.testing.assert_close(parts["distillation"], 2.0 * (q * (q / p).log()).sum() / 2)
    error = ((out.features - teacher.features) ** 2 * alive).sum() / (alive.sum() * 12)
    torch.testing.assert_close(parts["token_distillation"], 3.0 * error)
    for name, reference, weight in (("reconstruction", teacher, 0.5), ("self_distillation", out, 0.25)):
        total = sum(
            ((mine.connectivity.approx - other.dense_weights()[:, :, 1:]) ** 2).sum()
            for mine, other in zip(out.layers, reference.layers, strict=True)
        )
        torch.testing.assert_close(parts[name], weight * total / 4)
    kl = sparsifiner_loss(out, labels, teacher, reconstruction=1.0, criterion="kl")["reconstruction"]
    want = 0.0
    for mine, other in zip(out.layers, teacher.layers, strict=True):
        w = other.dense_weights()[:, :, 1:]
        want = want + (w * (w.log() - mine.connectivity.approx.log_softmax(-1))).sum() / 2 / 4
    torch.testing.assert_close(kl, want)
    assert sparsifiner_loss(out, labels, teacher, reconstruction=1.0, criterion="ce")["reconstruction"] > 0


def test_the_first_stage_trains_the_predictors_alone_and_brings_them_nearer() -> None:
    teacher = vit(attn_keep_rate=1.0).forward_details(images())
    model = vit().reconstruct().train()
    assert {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad} == {"mask_predictor"}
    zero = {"classification": 0.0, "distillation": 0.0, "token_distillation": 0.0}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = sparsifiner_loss(model.forward_details(images()), teacher=teacher, reconstruction=0.01, **zero)
        optimizer.zero_grad()
        loss["reconstruction"].backward()
        optimizer.step()
        losses.append(loss["reconstruction"].item())
    assert losses[-1] < 0.5 * losses[0]
    model.reconstruct(False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "mask_predictor" in n)
    assert model.head.weight.requires_grad


def test_losses_say_what_they_need() -> None:
    model = vit()
    out = model.forward_details(images())
    with pytest.raises(ArgumentError, match="labels"):
        sparsifiner_loss(out)
    with pytest.raises(ArgumentError, match="teacher"):
        sparsifiner_loss(out, torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match="frozen"):
        sparsifiner_loss(out, torch.tensor([0, 1]), out, reconstruction=1.0)
    with pytest.raises(ArgumentError, match="criterion"):
        sparsifiner_loss(out, torch.tensor([0, 1]), out, criterion="l1")
