"""`record` on vision transformers, encoder-decoders, timm, torch and regard's own modules, and its laws."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import regard
from regard import masks
from regard.attention.statistics import distance_edges, statistics
from regard.errors import ArgumentError, Unsupported
from regard.sites import find_sites, register
from tests.tiny_models import tiny

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def louder(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model.eval()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def agrees(layer, weights):
    close(layer.rows, weights)
    close(layer.mass, weights.sum(2))
    close(layer.entropy, torch.special.entr(weights).sum(-1))
    close(layer.peak, weights.amax(-1))
    close(layer.spans[..., 0], weights[..., 0])
    close(layer.mass.sum(-1), layer.counted[:, None].expand(-1, weights.shape[1]).float())


def vision(name):
    if name == "dinov2":
        return louder(transformers.Dinov2Model(transformers.Dinov2Config(**_SMALL, image_size=56, patch_size=14)))
    if name == "vit":
        return louder(transformers.ViTModel(transformers.ViTConfig(**_SMALL, image_size=56, patch_size=14)))
    config = transformers.SiglipVisionConfig(**_SMALL, image_size=56, patch_size=14, vision_use_head=False)
    return louder(transformers.SiglipVisionModel(config))


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip"])
def test_vision_transformers_equal_eager_attention(name) -> None:
    model, images = vision(name), torch.rand(2, 3, 56, 56)
    before = model(images).last_hidden_state
    found = regard.record(model, images, queries="all")
    assert {layer.kind for layer in found.layers.values()} == {"encoder"}
    assert list(found.layers) == [0, 1]
    model.set_attn_implementation("eager")
    out = model(images, output_attentions=True)
    for layer, weights in zip(found.layers.values(), out.attentions, strict=True):
        agrees(layer, weights.detach())
    close(before, out.last_hidden_state)


def test_distances_in_a_picture_are_those_of_patches() -> None:
    model, images = vision("vit"), torch.rand(1, 3, 56, 56)
    layer = regard.record(model, images, queries="all").layers[1]
    patches = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    gap = (patches[:, None] - patches).abs().amax(-1)
    assert layer.edges == (0, 1, 2, 4)
    for b, (low, high) in enumerate(zip(layer.edges, layer.edges[1:], strict=False)):
        close(layer.distance[..., b], (layer.rows[:, :, 1:, 1:] * ((gap >= low) & (gap < high))).sum((-1, -2)))


def test_a_text_encoder_and_its_padding() -> None:
    model = louder(transformers.BertModel(transformers.BertConfig(**_SMALL, vocab_size=97)))
    ids, valid = torch.randint(3, 97, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    valid[1, 9:] = 0
    found = regard.record(model, {"input_ids": ids, "attention_mask": valid}, queries="all")
    model.set_attn_implementation("eager")
    weights = model(ids, attention_mask=valid, output_attentions=True).attentions
    assert found.counted.tolist() == [12, 9]
    for layer, expected in zip(found.layers.values(), weights, strict=True):
        agrees(layer, expected.detach() * valid[:, None, :, None])


def encoder_decoder(name):
    if name == "bart":
        return louder(transformers.BartForConditionalGeneration(transformers.BartConfig(**_BOTH)))
    if name == "whisper":
        config = transformers.WhisperConfig(
            **_BOTH, num_mel_bins=8, max_source_positions=20, max_target_positions=40, suppress_tokens=None,
            begin_suppress_tokens=None,
        )  # fmt: skip
        return louder(transformers.WhisperForConditionalGeneration(config))
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return louder(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_encoder_decoders_equal_eager_attention(name) -> None:
    model = encoder_decoder(name)
    sound = name == "whisper"
    source = torch.randn(2, 8, 40) if sound else torch.randint(3, 97, (2, 11))
    inputs = {"input_features" if sound else "input_ids": source, "decoder_input_ids": torch.randint(3, 97, (2, 7))}
    if not sound:
        inputs["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
        inputs["attention_mask"][1, 8:] = 0
    spans = {"start": range(4)}
    found = regard.record(model, inputs, queries="all", tokens=spans)
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    for kind, expected in (
        ("encoder", out.encoder_attentions), ("decoder", out.decoder_attentions), ("cross", out.cross_attentions)
    ):  # fmt: skip
        part = found.of(kind)
        assert len(part.layers) == len(expected)
        for layer, weights in zip(part.layers.values(), expected, strict=True):
            weights = weights.detach()
            if kind == "encoder" and not sound:
                weights = weights * inputs["attention_mask"][:, None, :, None]
            agrees(layer, weights)
            if kind == "cross":
                close(layer.spans[..., 1], weights[..., :4].sum(-1))
                assert layer.mean_distance.isnan().all()
    with pytest.raises(ArgumentError, match="kind: recorded were decoder sites, not 'cross'"):
        found.of("decoder").of("cross")


def test_generation_of_an_encoder_decoder() -> None:
    model, ids = encoder_decoder("bart"), torch.randint(3, 97, (1, 9))
    found = regard.record(model, ids, queries="all", max_new_tokens=6)
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)[:, :-1]
    model.set_attn_implementation("eager")
    out = model(ids, decoder_input_ids=whole, output_attentions=True)
    for kind, expected in (("decoder", out.decoder_attentions), ("cross", out.cross_attentions)):
        for layer, weights in zip(found.of(kind).layers.values(), expected, strict=True):
            agrees(layer, weights.detach())
    assert found.of("encoder").counted.tolist() == [9]


def test_language_methods_are_refused_where_they_have_no_place() -> None:
    from regard.methods.language.h2o import H2O

    with (
        pytest.raises(Unsupported, match="h2o is for decoder attention, ViTModel has encoder"),
        regard.apply(vision("vit"), H2O()),
    ):
        pass


def test_timm_equals_its_explicit_attention() -> None:
    from tests.timm_shim import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, qk_norm=True, num_classes=5
    ).eval()
    images, seen = torch.rand(2, 3, 64, 64), []
    found = regard.record(model, images, queries="all")
    before = model(images)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    close(model(images), before)
    assert len(seen) == len(found.layers) == 2
    for layer, weights in zip(found.layers.values(), seen, strict=True):
        agrees(layer, weights)
    assert found.layers[0].edges == (0, 1, 2, 4)
    with pytest.raises(Unsupported, match=r"nothing was recorded of blocks\.0\.attn \(Attention\)"):
        regard.record(model, images)


def test_methods_work_on_timm_too() -> None:
    from tests.timm_shim import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3).eval()

    class Silence(regard.sites.Method):
        kinds = frozenset({"encoder"})

        def heads(self, call, out):
            out = out.clone()
            out[:, 1] = 0
            return out

    images = torch.rand(1, 3, 32, 32)
    before, forward = model(images), type(model.blocks[0].attn).forward
    with regard.apply(model, Silence()):
        assert (model(images) - before).abs().max() > 1e-4
    assert model(images).equal(before)
    assert model.blocks[0].attn.forward.__func__ is forward


def test_a_torch_transformer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    found = regard.record(model, {"src": x, "src_key_padding_mask": padding}, queries="all")
    attention = model.layers[0].self_attn
    bias = torch.zeros(2, 7).masked_fill(padding, -torch.inf)
    _, weights = attention(x, x, x, key_padding_mask=bias, average_attn_weights=False)
    close(found.layers[0].rows, weights.detach())
    with pytest.raises(Unsupported, match="must be called with need_weights=False"):
        regard.record(_NeedsWeights(), x)


class _NeedsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_regards_own_modules() -> None:
    torch.manual_seed(0)
    mixer = regard.create("softmax", dim=32, num_heads=4, causal=True)
    x, valid = torch.randn(2, 10, 32), torch.ones(2, 10, dtype=torch.bool)
    valid[0, 7:] = False
    before = mixer(x, valid=valid)
    found = regard.record(mixer, {"x": x, "valid": valid}, queries="all")
    assert mixer(x, valid=valid).equal(before)
    assert found.layers[0].kind == "decoder"
    assert found.counted.tolist() == [7, 10]
    rows = found.layers[0].rows
    close(rows.sum(-1), valid[:, None].expand(-1, 4, -1).float())
    assert not rows.triu(1).any()


def test_modules_without_weights_are_left_out_or_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        regard.create("softmax", dim=32, num_heads=4), regard.create("lightning-attention", dim=32, num_heads=4)
    )
    x = torch.randn(1, 9, 32)
    assert list(regard.record(model, x).layers) == [0]
    with pytest.raises(Unsupported, match="nothing was recorded of 1 "):
        regard.record(model, x, layers=[1])


class OwnAttention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(dim, 3 * dim), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_unknown_attention_is_named_and_can_be_registered(monkeypatch) -> None:
    monkeypatch.setattr("regard.sites.calls._REGISTERED", {})
    model, x = nn.Sequential(OwnAttention()), torch.randn(2, 6, 32)
    with pytest.raises(Unsupported, match=r"0 \(OwnAttention\).*regard\.sites\.register\(OwnAttention\)"):
        find_sites(model)
    register(OwnAttention, kind="decoder")
    found = regard.record(model, x, queries="all").layers[0]
    q, k, _ = model[0].qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    close(found.rows, scores.softmax(-1).detach())
    for bad in (object(), OwnAttention()):
        with pytest.raises(ArgumentError, match="module_type: expected a class of modules"):
            register(bad)
    with pytest.raises(ArgumentError, match="kind: expected"):
        register(OwnAttention, kind="other")


class Twice(OwnAttention):
    def forward(self, x):
        return super().forward(super().forward(x))


def test_attention_computed_twice_in_a_forward_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("regard.sites.calls._REGISTERED", {Twice: "decoder"})
    with pytest.raises(Unsupported, match="computes attention more than once in a forward"):
        regard.record(nn.Sequential(Twice()), torch.randn(1, 5, 32))


# --- top keys, full maps, limits ----------------------------------------------------------------------------------


def test_top_keys_are_those_of_the_rows() -> None:
    model, ids = tiny("llama"), torch.randint(3, 97, (2, 21))
    found = regard.record(model, ids, queries="all", top="all", top_k=5)
    for layer in found.layers.values():
        assert layer.top == tuple(range(21))
        best = layer.rows.topk(5)
        close(layer.top_weights, best.values)
        close(layer.rows.gather(-1, layer.top_keys), best.values)


def test_full_maps_keep_to_the_limit_that_is_stated() -> None:
    model, ids = tiny("llama"), torch.randint(3, 97, (1, 20))
    needed = 3 * 4 * 20 * 20 * 4
    with pytest.raises(ArgumentError, match=f"need {needed:,} bytes, max_bytes is {needed - 1:,}"):
        regard.record(model, ids, queries="all", max_bytes=needed - 1)
    found = regard.record(model, ids, queries="all", max_bytes=needed)
    assert sum(layer.rows.numel() * 4 for layer in found.layers.values()) == needed
    with pytest.raises(ArgumentError, match="queries: expected positions or 'all'"):
        regard.record(model, ids, queries="every")


def test_flow_between_spans() -> None:
    model, ids = tiny("llama"), torch.randint(3, 97, (1, 12))
    groups = {"a": range(5), "b": range(5, 12)}
    found = regard.record(model, ids, tokens=groups, queries="all")
    for i, flow in found.flow(groups).items():
        rows = found.layers[i].rows
        expected = [
            [rows[0, :, list(q)][..., list(k)].sum(-1).mean(-1) for k in groups.values()] for q in groups.values()
        ]
        close(flow[0, ..., 1:], torch.stack([torch.stack(row, -1) for row in expected], 1))
    with pytest.raises(ArgumentError, match=r"spans: 'c' must be some of the positions 0\.\.11"):
        found.flow({"c": [12]})


# --- laws of the statistics ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 17),
    extra=st.integers(0, 9),
    groups=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["random", "causal", "sliding", "padding", "none", "bias"]),
    chunk=st.sampled_from([1, 64, 2**21]),
)
def test_statistics_equal_those_of_materialised_weights(seed, n, extra, groups, kind, chunk) -> None:
    g = torch.Generator().manual_seed(seed)
    m = n + extra
    q, k = (torch.randn(2, h, length, 8, generator=g) for h, length in ((4, n), (4 // groups, m)))
    allowed, mask, bias = torch.ones(2, 4, n, m, dtype=torch.bool), None, None
    if kind == "random":
        allowed = torch.rand(2, 4, n, m, generator=g) < 0.5
        mask = allowed
    elif kind == "causal":
        mask = masks.causal().shift(extra)
    elif kind == "sliding":
        mask = masks.sliding_window(4).shift(extra)
    elif kind == "padding":
        mask = masks.padding(torch.rand(2, m, generator=g) < 0.6)
    elif kind == "bias":
        bias = torch.randn(4, n, m, generator=g)
    if mask is not None and kind != "random":
        allowed = mask.dense(n, m).expand(2, 4, n, m)
    scores = q @ k.repeat_interleave(groups, 1).mT / 8**0.5 + (0 if bias is None else bias)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.attention.statistics._CHUNK_WEIGHTS", chunk)
        found = statistics(q, k, mask=mask, bias=bias, rows=range(n), top=range(n), top_k=3)
    close(found.rows, weights)
    close(found.mass, weights.sum(2))
    seen = allowed.any(-1)
    close(found.rows.sum(-1), seen.float())  # mass sums to one per query that sees anything
    close(found.mass.sum(-1), seen.float().sum(-1))
    close(found.distance.sum(-1), seen.float().sum(-1))
    close(found.entropy, torch.special.entr(weights).sum(-1))
    close(found.peak, weights.amax(-1))
    close(found.top_weights, weights.topk(min(3, m)).values)
    gap = (torch.arange(m - n, m)[:, None] - torch.arange(m)).abs()
    edges = distance_edges(m)
    for b in range(len(edges) - 1):
        inside = (gap >= edges[b]) & (gap < edges[b + 1])
        close(found.distance[..., b], (weights * inside).sum((-1, -2)))
