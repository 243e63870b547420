"""Attention as explanation: aggregation, pooling, correlation against SciPy's, and deletion."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from regard.errors import ArgumentError, ShapeError
from regard.probes import (
    Deletion,
    aggregate_cross_attention,
    auc,
    deletion_curve,
    explanation_correlation,
    pool_saliency,
    record,
)


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_aggregation_is_the_mean_of_the_chosen() -> None:
    maps = noise(3, 4, 5, 6).softmax(-1)
    torch.testing.assert_close(aggregate_cross_attention(maps), maps.mean((0, 1)))
    some = (maps[0, 1] + maps[0, 3] + maps[2, 1] + maps[2, 3]) / 4
    torch.testing.assert_close(aggregate_cross_attention(tuple(maps), [0, 2], [1, 3]), some)
    torch.testing.assert_close(aggregate_cross_attention({7: maps[1], 9: maps[2]}, [9]), maps[2].mean(0))
    pair = (maps[0, 0] + maps[1, 2]) / 2
    torch.testing.assert_close(aggregate_cross_attention(maps, pairs=[(0, 0), (1, 2)]), pair)
    batched = noise(2, 4, 5, 6)
    assert aggregate_cross_attention([batched]).shape == (2, 5, 6)


def test_cross_attention_is_taken_from_a_recording() -> None:
    config = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 8, "vocab_size": 9, "conv_channels": 8}
    torch.manual_seed(0)
    speech = transformers.Speech2TextForConditionalGeneration(
        transformers.Speech2TextConfig(**config, input_feat_per_channel=4, max_source_positions=32)
    ).eval()
    inputs = {"input_features": torch.randn(1, 20, 4), "decoder_input_ids": torch.tensor([[2, 5, 6]])}
    found = aggregate_cross_attention(record(speech, inputs, queries="all"), [1], [0])
    speech.set_attn_implementation("eager")
    with torch.no_grad():
        maps = speech(**inputs, output_attentions=True).cross_attentions
    assert found.shape == (1, 3, 5)
    torch.testing.assert_close(found, maps[1][:, 0])
    torch.testing.assert_close(aggregate_cross_attention(maps, [1], [0]), found)


def test_pooling() -> None:
    saliency = noise(2, 10, 3)
    blocks = [slice(0, 4), slice(4, 8), slice(8, 10)]
    for mode, of_block in (
        ("max2d", lambda block: block.amax()),
        ("max_mean", lambda block: block.amax(1).mean()),
        ("mean", lambda block: block.mean()),
    ):
        want = torch.stack([torch.stack([of_block(saliency[i, b]) for b in blocks]) for i in range(2)])
        torch.testing.assert_close(pool_saliency(saliency, 3, mode), want)
    torch.testing.assert_close(pool_saliency(saliency, 10), saliency.amax(2))


@given(st.integers(0, 500), st.booleans())
@settings(max_examples=30, deadline=None)
def test_correlation_is_scipys(seed, ties) -> None:
    a, b = noise(3, 4, 5, seed=seed), noise(4, 5, seed=seed + 1)
    if ties:
        a, b = a.round(), b.round()
    pearson = explanation_correlation(a, b)
    spearman = explanation_correlation(a, b, method="spearman")
    for i in range(3):
        x, y = a[i].flatten().numpy(), b.flatten().numpy()
        assert float(pearson[i]) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
        assert float(spearman[i]) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_correlation_does_not_mind_scale_and_uniform_maps_explain_nothing() -> None:
    a = noise(4, 6).softmax(-1)
    assert float(explanation_correlation(a, 3 * a + 1)) == pytest.approx(1)
    assert float(explanation_correlation(a, -a, method="spearman")) == pytest.approx(-1)
    uniform = torch.full((4, 6), 1 / 6)
    assert float(explanation_correlation(uniform, a)) == 0
    assert float(explanation_correlation(a, uniform.double(), method="spearman")) == 0


def test_frame_norm_takes_sinks_away() -> None:
    relevance = torch.eye(5, dtype=torch.float64) + 0.1 * noise(5, 5).abs()
    sink = relevance / 20
    sink[:, -1] += 0.9  # all tokens look at the last frame
    plain, normed = (float(explanation_correlation(sink, relevance, frame_norm=norm)) for norm in (False, True))
    assert plain < 0.4 < 0.8 < normed
    centred = (sink - sink.mean(0)) / sink.std(0)
    assert normed == pytest.approx(float(explanation_correlation(centred, relevance)))


def test_deletion_takes_the_most_relevant_first() -> None:
    relevance = torch.tensor([0.1, 0.5, 0.3, 0.2])
    worth = torch.tensor([0.0, 0.7, 0.2, 0.1])
    seen = []
    curve = deletion_curve(lambda gone: float(worth[~gone].sum()), relevance, 4, on_progress=seen.append)
    torch.testing.assert_close(curve.scores, torch.tensor([1.0, 0.3, 0.1, 0.0, 0.0]))
    assert curve.percentages.tolist() == [0, 25, 50, 75, 100]
    assert seen == [1, 2, 3, 4, 5]
    backwards = deletion_curve(lambda gone: float(worth[~gone].sum()), -relevance, 4)
    assert auc(curve) < auc(backwards)
    of_tokens = deletion_curve(lambda gone: float(worth[~gone].sum()), relevance.repeat(3, 1), 4)
    torch.testing.assert_close(of_tokens.scores, curve.scores)


def test_area_is_by_trapezoids() -> None:
    assert auc(Deletion(torch.tensor([0.0, 50, 100]), torch.tensor([1.0, 0.5, 0.0]))) == pytest.approx(50)
    assert auc(Deletion(torch.linspace(0, 100, 21), torch.ones(21))) == pytest.approx(100)


def test_refusals() -> None:
    maps = noise(2, 3, 4, 5)
    for arguments, message in (
        ({"layers": [2]}, "no layer and head"),
        ({"heads": [3]}, "no layer and head"),
        ({"heads": []}, "at least one"),
        ({"layers": [0], "pairs": [(0, 0)]}, "got both"),
    ):
        with pytest.raises(ArgumentError, match=message):
            aggregate_cross_attention(maps, **arguments)
    with pytest.raises(ShapeError, match="of layer 0"):
        aggregate_cross_attention([noise(4, 5)])
    with pytest.raises(ShapeError, match="saliency: expected"):
        pool_saliency(noise(4, 5), 2)
    with pytest.raises(ArgumentError, match="mode"):
        pool_saliency(noise(2, 4, 5), 2, "min")
    for out_len in (0, 7, 4):
        with pytest.raises(ArgumentError, match="shared out evenly"):
            pool_saliency(noise(2, 6 if out_len != 4 else 9, 5), out_len)
    with pytest.raises(ShapeError, match="the same"):
        explanation_correlation(noise(4, 5), noise(4, 6))
    with pytest.raises(ArgumentError, match="method"):
        explanation_correlation(noise(4, 5), noise(4, 5), method="kendall")
    with pytest.raises(ShapeError, match="two of them"):
        explanation_correlation(noise(1, 5), noise(1, 5), frame_norm=True)
    with pytest.raises(ArgumentError, match="steps"):
        deletion_curve(lambda gone: 0.0, torch.zeros(3), 0)
    with pytest.raises(ShapeError, match="relevance"):
        deletion_curve(lambda gone: 0.0, torch.zeros(2, 3, 4))
