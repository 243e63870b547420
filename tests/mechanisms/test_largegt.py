"""LargeGT against its definition in loops: codebook, local module, sampler, and the whole model."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.graph.codebook import CodebookAttention, EMACodebook, codebook_attention
from regard.models.graph.largegt import LargeGT, LocalModule
from regard.models.graph.sampler import LargeGTSampler


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the codebook


def test_a_codebook_that_is_exact_is_attention_to_all_nodes() -> None:
    assignment = torch.tensor([0, 3, 3, 0, 3, 4, 0, 0])  # of eight nodes to five vectors, two of which are empty
    k, v, q = randn(1, 2, 5, 3), randn(1, 2, 5, 4, seed=2), randn(1, 2, 6, 3, seed=3)
    want = nn.functional.scaled_dot_product_attention(q, k[:, :, assignment], v[:, :, assignment])
    got = codebook_attention(q, k, v, torch.bincount(assignment, minlength=5))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_dropout_drops_weights() -> None:
    torch.manual_seed(0)
    q, k, each = randn(1, 1, 400, 3), randn(1, 1, 5, 3, seed=2), torch.eye(5, dtype=torch.float64)[None, None]
    counts = torch.tensor([1, 0, 2, 3, 1])
    weights, dropped = codebook_attention(q, k, each, counts), codebook_attention(q, k, each, counts, dropout=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert 0.7 < kept[..., counts > 0].double().mean() < 0.8


def test_an_update_is_its_definition() -> None:
    torch.manual_seed(0)
    book = EMACodebook(3, 4, decay=0.9).double().train()
    book.cluster_size.copy_(torch.tensor([2.0, 0.5, 1.0, 0.0]))
    w, size, s = book.embedding.tolist(), book.cluster_size.tolist(), book.embedding_sum.tolist()
    x = randn(7, 3) * 2 + 1
    got = book.update(x)

    mean, var = x.mean(0), x.var(0, unbiased=False)
    normalised = ((x - mean) / (var + 1e-5).sqrt()).tolist()
    nearest = [min(range(4), key=lambda c, xi=xi: math.dist(xi, w[c])) for xi in normalised]
    assert got.tolist() == nearest
    size = [0.9 * size[c] + 0.1 * nearest.count(c) for c in range(4)]
    total = sum(size)
    size = [(n + 1e-5) / (total + 4e-5) * total for n in size]
    for c in range(4):
        for j in range(3):
            s[c][j] = 0.9 * s[c][j] + 0.1 * sum(xi[j] for xi, a in zip(normalised, nearest, strict=True) if a == c)
    torch.testing.assert_close(book.cluster_size, torch.tensor(size, dtype=torch.float64))
    torch.testing.assert_close(book.embedding_sum, torch.tensor(s, dtype=torch.float64))
    w = torch.tensor([[s[c][j] / size[c] for j in range(3)] for c in range(4)], dtype=torch.float64)
    torch.testing.assert_close(book.embedding, w)
    running = 0.9 + 0.1 * x.var(0)
    torch.testing.assert_close(book.centroids, w * (running + 1e-5).sqrt() + 0.1 * mean)


def test_outside_training_an_update_only_assigns() -> None:
    book = EMACodebook(3, 4).double().eval()
    before = {name: t.clone() for name, t in book.state_dict().items()}
    nearest = book.update(book.embedding * math.sqrt(1 + 1e-5))
    assert nearest.tolist() == [0, 1, 2, 3]
    assert all(torch.equal(t, before[name]) for name, t in book.state_dict().items())


def test_the_codebook_finds_clusters() -> None:
    torch.manual_seed(0)
    centres, who = randn(4, 6, seed=5) * 5, torch.arange(64) % 4
    book = EMACodebook(6, 32, decay=0.8).double().train()
    for step in range(60):
        book.update(centres[who] + 0.05 * randn(64, 6, seed=step))
    book.eval()
    found = book.centroids[book.update(centres)]
    spread = (centres - centres.mean(0)).square().sum()
    assert (found - centres).square().sum() < 0.1 * spread  # two may share a vector


def attention_module(**config) -> CodebookAttention:
    torch.manual_seed(0)
    given = {"dim": 5, "num_heads": 2, "head_dim": 3, "global_dim": 4, "num_nodes": 11, "num_centroids": 6}
    return randomised(CodebookAttention(**{**given, **config}))


def naive_global(layer: CodebookAttention, x: Tensor, pos_enc: Tensor) -> Tensor:
    counts = Counter(layer.assignment.tolist())
    asking = torch.cat([x @ layer.g_proj.weight.T + layer.g_proj.bias, pos_enc], 1)
    out = torch.zeros(len(x), 6, dtype=torch.float64)
    book = layer.codebook.centroids
    for i in range(len(x)):
        q = layer.q_proj.weight @ asking[i] + layer.q_proj.bias
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            weights = {}
            for c, count in counts.items():
                k = layer.k_proj.weight @ book[c] + layer.k_proj.bias
                weights[c] = count * math.exp(float(q[part] @ k[part]) / math.sqrt(3))
            for c, weight in weights.items():
                v = layer.v_proj.weight @ book[c, :4] + layer.v_proj.bias
                out[i, part] += weight / sum(weights.values()) * v[part]
    return out


def test_global_attention_is_its_definition() -> None:
    layer = attention_module()
    layer.assignment.clamp_(max=3)  # vectors 4 and 5 stand for nothing
    x, pos_enc = randn(3, 5), randn(3, 4, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, pos_enc), naive_global(layer, x, pos_enc), atol=1e-12, rtol=0)


def test_in_training_the_codebook_follows_after_it_was_attended_to() -> None:
    layer = attention_module()
    x, pos_enc, nodes = randn(3, 5), randn(3, 4, seed=2), torch.tensor([7, 0, 10])
    want, before = layer(x, pos_enc), layer.assignment.clone()
    old = layer.codebook.centroids.clone()
    layer.train()
    torch.testing.assert_close(layer(x, pos_enc, nodes), want, atol=0, rtol=0)
    assert not torch.equal(layer.codebook.centroids, old)
    others = torch.ones(11, dtype=torch.bool)
    others[nodes] = False
    assert torch.equal(layer.assignment[others], before[others])
    again = attention_module().train()
    expected = again.codebook.update(torch.cat([again.g_proj(x), pos_enc], 1))
    assert torch.equal(layer.assignment[nodes].long(), expected)
    assert layer.counts().sum() == 11


def test_gradients_in_training_are_those_of_the_codebook_before_its_update() -> None:
    x, pos_enc, nodes = randn(3, 5), randn(3, 4, seed=2), torch.tensor([7, 0, 10])
    still, moving = attention_module(), attention_module().train()
    still(x, pos_enc).square().sum().backward()
    moving(x, pos_enc, nodes).square().sum().backward()
    for (name, want), got in zip(still.named_parameters(), moving.parameters(), strict=True):
        assert want.grad.abs().sum() > 0 or name == "k_proj.bias"  # one number more for all keys changes nothing
        torch.testing.assert_close(got.grad, want.grad, atol=1e-12, rtol=0)


def test_large_codebooks_are_counted_in_larger_integers() -> None:
    assert attention_module().assignment.dtype == torch.int16
    assert attention_module(num_centroids=40_000, global_dim=1).assignment.dtype == torch.int32


def test_gradients() -> None:
    layer = attention_module()
    assert torch.autograd.gradcheck(layer, (randn(2, 5).requires_grad_(), randn(2, 4).requires_grad_()))
    local = randomised(LocalModule(4, 2))
    assert torch.autograd.gradcheck(local, randn(2, 3, 4).requires_grad_())


# the local module


def test_the_local_module_is_its_definition() -> None:
    layer, seq = randomised(LocalModule(4, 3)), randn(2, 6, 4)

    def linear(module: nn.Linear, x: Tensor) -> Tensor:
        return module.weight @ x + module.bias

    def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * module.weight + module.bias

    with torch.no_grad():
        for b in range(2):
            t = [linear(layer.embed, s) for s in seq[b]]
            h = [norm(layer.norm, s) for s in t]
            q, k, v = ([linear(p, s) for s in h] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            z = []
            for i in range(6):
                heads = []
                for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
                    weights = [math.exp(float(q[i][part] @ k[j][part]) / 2) for j in range(6)]
                    heads.append(sum(w / sum(weights) * v[j][part] for j, w in enumerate(weights)))
                z.append(norm(layer.final_norm, linear(layer.res_proj, t[i]) + linear(layer.o_proj, torch.cat(heads))))
            gates = [math.exp(float(linear(layer.gate, torch.cat([z[0], z[u]])))) for u in range(1, 6)]
            want = z[0] + sum(g / sum(gates) * z[u] for u, g in enumerate(gates, 1))
            torch.testing.assert_close(layer(seq)[b], want, atol=1e-11, rtol=0)


# the model

SMALL = {"num_nodes": 20, "in_channels": 5, "hidden_channels": 4, "out_channels": 3, "global_dim": 2}
SMALL |= {"num_heads": 2, "num_centroids": 6, "sample_node_len": 2}


def model(**config) -> LargeGT:
    torch.manual_seed(0)
    return randomised(LargeGT(**{**SMALL, **config}))


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return randn(size, 6, 5), randn(size, 5, seed=2), randn(size, 2, seed=3), torch.arange(size)


@pytest.mark.parametrize("norm_type", ["batch_norm", "layer_norm", "none"])
def test_halves_are_concatenated(norm_type: str) -> None:
    whole = model(norm_type=norm_type)
    seq, x, pos_enc, nodes = batch()
    local = whole.local_module(whole.fc_in_seq(seq))
    far = whole.global_module(whole.fc_in(x), pos_enc)
    torch.testing.assert_close(whole(seq, x, pos_enc), whole.fc_out(whole.ff(torch.cat([local, far], 1))))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in whole.modules()) == (4 if norm_type == "batch_norm" else 1)
    one = whole(*(t[:1] for t in (seq, x, pos_enc, nodes)))
    torch.testing.assert_close(one, whole(seq, x, pos_enc)[:1])  # a batch of one keeps its axis


def test_one_half_needs_nothing_of_the_other() -> None:
    seq, x, pos_enc, nodes = batch()
    assert model(conv_type="local")(seq).shape == (4, 3)
    far = model(conv_type="global").train()
    assert far(x=x, pos_enc=pos_enc, batch_idx=nodes).shape == (4, 3)
    assert not any("local" in name for name, _ in far.named_parameters())


def official(whole: LargeGT, channels: int = 4) -> dict[str, Tensor]:
    """A state dict named as published, with what published code has and never reads."""
    names = {
        "local_module.embed": "convs.0.local_module.att_embeddings_nope",
        "local_module.gate": "convs.0.local_module.attn_layer",
        "local_module.final_norm": "convs.0.local_module.final_ln",
        "local_module.norm": "convs.0.local_module.layers.0.self_attention_norm",
        "local_module.res_proj": "convs.0.local_module.layers.0.res_proj",
        "local_module.o_proj": "convs.0.local_module.layers.0.self_attention.output_layer",
        "ff": "ffs.0",
    }
    names |= {f"local_module.{n}_proj": f"convs.0.local_module.layers.0.self_attention.linear_{n}" for n in "qkv"}
    state = {}
    for name, tensor in whole.state_dict().items():
        old = max((o for o in names if name.startswith(o + ".")), key=len, default=None)
        state[name if old is None else names[old] + name[len(old) :]] = tensor
    state |= {f"fc_in.{i}.{kind}": torch.zeros(1) for i in (0, 4) for kind in ("weight", "bias")}
    state |= {f"convs.0.lin_{n}.bias": torch.zeros(1) for n in ("key", "query", "value", "skip")}
    return state | {"convs.0.local_module.out_proj.bias": torch.zeros(1)}


def test_published_weights_of_one_half() -> None:
    whole = model(conv_type="local", norm_type="layer_norm")
    kwargs = {name: value for name, value in SMALL.items() if name != "num_heads"} | {"heads": 2, "num_layers": 1}
    kwargs |= {"conv_type": "local", "norm_type": "layer_norm", "no_bn": False, "skip": True, "ff_dropout": 0.1}
    again = regard.from_official("largegt", official(whole), **kwargs).double().eval()
    torch.testing.assert_close(again(batch()[0]), whole(batch()[0]), atol=1e-6, rtol=1e-5)
    with pytest.raises(Unsupported, match="num_layers"):
        regard.from_official("largegt", official(whole), **{**kwargs, "num_layers": 2})
    with pytest.raises(ArgumentError, match="missing"):
        regard.from_official("largegt", official(whole), **{**kwargs, "conv_type": "full"})


def test_weights_go_into_a_folder_and_back(tmp_path) -> None:
    whole = model().float()
    seq, x, pos_enc, _ = (t.float() if t.is_floating_point() else t for t in batch())
    whole.save_pretrained(tmp_path)
    again = LargeGT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(seq, x, pos_enc), whole(seq, x, pos_enc), atol=0, rtol=0)


def test_bad_arguments_are_refused() -> None:
    for config, name in (
        ({"conv_type": "both"}, "conv_type"),
        ({"norm_type": "rms"}, "norm_type"),
        ({"sample_node_len": 0}, "sample_node_len"),
        ({"num_nodes": 0}, "num_nodes"),
        ({"num_centroids": 0}, "num_centroids"),
        ({"num_heads": 0}, "num_heads"),
        ({"attn_dropout": 2.0}, "dropout"),
    ):
        with pytest.raises(ArgumentError, match=name):
            model(**config)
    seq, x, pos_enc, nodes = batch()
    whole = model()
    for given, name in (
        ((None, x, pos_enc), "seq"),
        ((seq[:, :-1], x, pos_enc), "seq"),
        ((seq, x[:, :-1], pos_enc), "x"),
        ((seq, x, None), "pos_enc"),
        ((seq, x, pos_enc[:-1]), "pos_enc"),
        ((seq, x, pos_enc, nodes[:-1]), "batch_idx"),
    ):
        with pytest.raises(ShapeError, match=name):
            whole(*given)
    with pytest.raises(ArgumentError, match="batch_idx"):
        whole.train()(seq, x, pos_enc)
    with pytest.raises(ShapeError, match="2 or more"):
        EMACodebook(3, 4).train().update(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="seq"):
        LocalModule(4, 2)(torch.zeros(2, 1, 4))


# the sampler

EDGES = {
    0: [1, 2],
    1: [0, 2, 3],
    2: [0],
    3: [4, 5, 6, 7],
    4: [],
    5: [0],
    6: [6],
    7: [0, 3],
}  # directed, node 4 has none


def graph() -> Tensor:
    dense = torch.zeros(8, 8, dtype=torch.float64)
    for node, others in EDGES.items():
        dense[node, others] = 1.0
    return dense


def sampler(k: int = 4, seed: int = 0) -> LargeGTSampler:
    return LargeGTSampler(graph().to_sparse_csr(), randn(8, 3), k, seed)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_candidates_are_neighbours_and_theirs() -> None:
    for node, near in EDGES.items():
        two = sorted({far for other in near for far in EDGES[other]})
        assert sampler().candidates(node).tolist() == near + two


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sequences_are_drawn_by_the_rules() -> None:
    found = sampler(k=6)
    sequences = found.nodes(torch.arange(8)).tolist()
    for node, sequence in enumerate(sequences):
        assert sequence[0] == node
        listed = found.candidates(node).tolist()
        if not listed:
            assert len(set(sequence[1:])) == 5
        elif len(listed) < 5:
            assert sequence[1:] == (listed * 5)[:5]
        else:
            assert not Counter(sequence[1:]) - Counter(listed)
    assert found.nodes(torch.tensor([3, 1])).tolist() == [sequences[3], sequences[1]]
    assert sampler(k=6, seed=1).nodes(torch.arange(8)).tolist() != sequences
    assert sampler(k=1).nodes(torch.arange(8)).tolist() == [[i] for i in range(8)]


@pytest.mark.filterwarnings("ignore:Sparse")
def test_draws_are_even() -> None:
    adj = torch.zeros(6, 6)
    adj[0, 1:] = 1.0  # node 0 has five neighbours without neighbours of their own
    drawn = Counter()
    for seed in range(600):
        drawn.update(
            LargeGTSampler(adj.to_sparse_csr(), torch.zeros(6, 1), 3, seed).nodes(torch.tensor([0]))[0, 1:].tolist()
        )
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert all(180 < count < 300 for count in drawn.values())  # 240 expected, deviation 12


@pytest.mark.filterwarnings("ignore:Sparse")
def test_tokens_are_features_over_two_hops() -> None:
    found, x = sampler(), randn(8, 3)
    full = graph() + torch.eye(8, dtype=torch.float64)
    averaging = full / full.sum(0)[:, None].sqrt() / full.sum(1)[None].sqrt()
    hops = [x, averaging @ x, averaging @ averaging @ x]
    seq, own = found(torch.tensor([5, 3]))
    assert torch.equal(own, x[[5, 3]])
    nodes = found.nodes(torch.tensor([5, 3]))
    for b in range(2):
        for place, node in enumerate(nodes[b].tolist()):
            for hop in range(3):
                torch.testing.assert_close(seq[b, 3 * place + hop], hops[hop][node], atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_the_sampler_refuses_what_it_cannot_read() -> None:
    x = torch.zeros(8, 3, dtype=torch.float64)
    for adj, features, k, error, name in (
        (graph(), x, 3, ShapeError, "adj"),
        (graph().to_sparse_csr(), x[:7], 3, ShapeError, "adj"),
        (graph().to_sparse_csr(), x[0], 3, ShapeError, "x"),
        (graph().to_sparse_csr(), x, 0, ArgumentError, "sample_node_len"),
        (graph().to_sparse_csr(), x, 10, ArgumentError, "sample_node_len"),
    ):
        with pytest.raises(error, match=name):
            LargeGTSampler(adj, features, k)
    with pytest.raises(ArgumentError, match="batch_idx"):
        sampler().nodes(torch.tensor([8]))
    with pytest.raises(ShapeError, match="batch_idx"):
        sampler().nodes(torch.tensor([1.0]))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_it_learns_what_only_far_nodes_know() -> None:
    """A node's class is that of its community, which its own features hardly show."""
    torch.manual_seed(0)
    n, classes = 240, 3
    labels = torch.arange(n) % classes
    linked = torch.rand(n, n) < torch.where(labels[:, None] == labels, 0.08, 0.01)
    linked = (linked | linked.T).fill_diagonal_(False)
    x = torch.nn.functional.one_hot(labels, classes) + 2.0 * torch.randn(n, classes)
    tokens = LargeGTSampler(linked.float().to_sparse_csr(), x, 4)
    local = LargeGT(n, classes, 16, classes, sample_node_len=4, conv_type="local", norm_type="layer_norm")
    optimizer = torch.optim.Adam(local.parameters(), lr=3e-3)
    train, test = torch.arange(n // 2), torch.arange(n // 2, n)
    for _ in range(60):
        loss = nn.functional.cross_entropy(local(tokens(train)[0]), labels[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    local.eval()
    right = (local(tokens(test)[0]).argmax(1) == labels[test]).double().mean()
    alone = (x[test].argmax(1) == labels[test]).double().mean()  # the best that features alone can do
    assert right > alone + 0.1
