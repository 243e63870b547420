"""How much of a speech model's saliency its cross-attention shows, where the alignment is known (arXiv:2509.18010)."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import require
from regard.probes import (
    aggregate_cross_attention,
    auc,
    deletion_curve,
    explanation_correlation,
    frame_masks,
    hide,
    occlusion_saliency,
    pool_saliency,
    record,
    slic_masks,
    standardise_token_maps,
)
from regard.study.finding import Claim, Finding, Progress
from regard.tasks.aligned_speech import SPAN, AlignedSpeech, Utterances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPECIAL, _START = 4, 2  # ids below are not of the vocabulary; the one a decoder starts with
_BATCH, _RATE = 32, 3e-3
_SEGMENTS = (48, 96, 144)
_CURVES = {"input saliency": "#d62728", "cross-attention": "#1f77b4", "random": "#7f7f7f"}

_SUMMARY = """
A tiny Speech2Text (transformers; two convolutions that take four frames to one, {enc} encoder and {dec} decoder layers
of {heads} heads, trained here from random weights) writes the tokens of made-up speech: each token is two gliding bands
in one of its two slots of four frames, the other slot is noise, and no token says anything about another. So it is
known where each one was heard. On {utterances} fresh utterances the decoder's cross-attention (`regard.record`) is
correlated with two saliencies by occlusion: of the input (SM-X, superpixels of the spectrogram, {masks} masks,
largest value in each block of four frames and all channels) and of the encoder's output (SM-H, {masks} masks of whole
frames). Correlations are Pearson's, of the flattened maps of an utterance, and the mean over utterances.

In the deletion test the most relevant frames are taken away in steps of 5% and tokens are decoded greedily; a faithful
explanation loses accuracy soon, so the smaller area is the better one.

With clean sounds in known places attention shows more of the saliency than the half of it that the paper finds in real
speech, and its first layer more than its last: there is nothing to translate, and what to write is settled once the
sound has been looked at. What carries over is the order: attention follows the encoder's frames more closely than the
input, all heads together do as well as the best of them, and saliency names frames whose loss hurts more.
"""


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Train, record, occlude and delete; about two minutes."""
    task = AlignedSpeech(num_tokens=3) if quick else AlignedSpeech()
    steps, count, n_masks = (20, 2, 60) if quick else (500, 12, 2000)
    total = steps + 2 * count
    report = on_progress or (lambda what, done, total: None)
    model = _model(task, seed)
    accuracy = _train(model, task, steps, seed, lambda done: report("training", done, total))
    heard = task.sample(count, torch.Generator().manual_seed(seed + 1))
    g = torch.Generator().manual_seed(seed + 2)
    found = []
    for i in range(count):
        report("saliency", steps + 2 * i, total)
        one = Utterances(*(part[i : i + 1] for part in heard))
        found.append(_explain(model, one, n_masks, g))
    rho, hits = _correlations(found, heard)
    uniform = deepcopy(model)
    for name, parameter in uniform.named_parameters():
        if "encoder_attn.q_proj" in name:
            nn.init.zeros_(parameter)
    flat = [_attention(uniform, Utterances(*(part[i : i + 1] for part in heard)))[0] for i in range(count)]
    rho["uniform"] = mean(
        float(explanation_correlation(aggregate_cross_attention(a), f["SM-X"]))
        for a, f in zip(flat, found, strict=True)
    )
    curves = _deletion(model, heard, found, g, lambda i: report("deletion", steps + count + i, total))
    data = {
        "accuracy": accuracy,
        "hits": hits,
        "correlations": rho,
        "percentages": curves["random"][0],
        "curves": {name: curve[1] for name, curve in curves.items()},
        "areas": {name: curve[2] for name, curve in curves.items()},
        "example": _example(heard, found),
    }
    report("done", total, total)
    config: Any = model.config
    shape = {"enc": config.encoder_layers, "dec": config.decoder_layers, "heads": config.decoder_attention_heads}
    return Finding(
        name="s2t-cross-attention",
        title="How much of a speech model's saliency its cross-attention shows",
        systems=("s2t-cross-attention-xai",),
        summary=_SUMMARY.format(**shape, utterances=count, masks=n_masks),
        claims=tuple(_claims(data)),
        settings={"utterances": count, "masks": n_masks, "training steps": steps, "batch": _BATCH, "rate": _RATE},
        data=data,
    )


# --- the model ----------------------------------------------------------------------------------------------------


def _model(task: AlignedSpeech, seed: int) -> nn.Module:
    transformers = require("transformers", "build the speech model")
    torch.manual_seed(seed)
    width = 48
    config = transformers.Speech2TextConfig(
        vocab_size=_SPECIAL + task.vocab_size,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        input_feat_per_channel=task.channels,
        input_channels=1,
        conv_channels=width,
        num_conv_layers=2,
        conv_kernel_sizes=(3, 3),
        max_source_positions=task.frames,
        max_target_positions=task.num_tokens + 2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=_START,
        decoder_start_token_id=_START,
        dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    model: nn.Module = transformers.Speech2TextForConditionalGeneration(config)
    return model


def _forced(tokens: Tensor) -> Tensor:
    """What the decoder reads: its start and all tokens but the last."""
    return torch.cat([tokens.new_full((len(tokens), 1), _START), tokens[:, :-1] + _SPECIAL], 1)


def _train(model: nn.Module, task: AlignedSpeech, steps: int, seed: int, on_step: Callable[[int], None]) -> float:
    """Returns the accuracy of forced decoding on fresh utterances."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        heard = task.sample(_BATCH, g)
        logits = model(input_features=heard.features, decoder_input_ids=_forced(heard.tokens)).logits
        F.cross_entropy(logits.flatten(0, 1), heard.tokens.flatten() + _SPECIAL).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            on_step(step)
    model.eval()
    with torch.no_grad():
        heard = task.sample(200, g)
        logits = model(input_features=heard.features, decoder_input_ids=_forced(heard.tokens)).logits
    return float((logits.argmax(-1) == heard.tokens + _SPECIAL).float().mean())


# --- maps ---------------------------------------------------------------------------------------------------------


def _attention(model: nn.Module, one: Utterances) -> tuple[dict[int, Tensor], int]:
    """By decoder layer, (H, I, T'); and T'."""
    inputs = {"input_features": one.features, "decoder_input_ids": _forced(one.tokens)}
    cross = record(model, inputs, queries="all").of("cross")
    maps = {i: layer.rows[0] for i, layer in enumerate(cross.layers.values())}
    return maps, maps[0].shape[-1]


@torch.no_grad()
def _explain(model: Any, one: Utterances, n_masks: int, g: torch.Generator) -> dict[str, Any]:
    """Cross-attention and both saliencies of one utterance; SM-X also whole, (I, T, F)."""
    maps, length = _attention(model, one)
    forced, spec = _forced(one.tokens), one.features[0]
    states = model.get_encoder()(one.features).last_hidden_state[0]

    def hear(masks: Tensor, _: Tensor | None) -> Tensor:
        given = forced.expand(len(masks), -1)
        return model(input_features=hide(spec, masks), decoder_input_ids=given).logits.softmax(-1)

    def read(masks: Tensor, _: Tensor | None) -> Tensor:
        given = forced.expand(len(masks), -1)
        return model(encoder_outputs=(hide(states, masks),), decoder_input_ids=given).logits.softmax(-1)

    masks = slic_masks(spec, _SEGMENTS, n_masks=n_masks, generator=g, full_length=len(spec))
    whole = standardise_token_maps(occlusion_saliency(hear, masks))
    encoder = standardise_token_maps(occlusion_saliency(read, frame_masks(length, n_masks, generator=g)))
    return {"CA": maps, "whole": whole, "SM-X": pool_saliency(whole, length), "SM-H": encoder}


def _correlations(found: list[dict[str, Any]], heard: Utterances) -> tuple[dict[str, Any], float]:
    """Means over utterances, by reference: of all heads, of each layer's mean and of each head; and hits of SM-X."""
    rho: dict[str, Any] = {}
    layers = list(found[0]["CA"])
    heads = range(len(found[0]["CA"][0]))
    for name in ("SM-X", "SM-H"):

        def of(name: str = name, **which: Any) -> float:
            return mean(
                float(explanation_correlation(aggregate_cross_attention(f["CA"], **which), f[name])) for f in found
            )

        rho[name] = {
            "all": of(),
            "layers": [of(layers=[i]) for i in layers],
            "heads": [[of(layers=[i], heads=[h]) for h in heads] for i in layers],
        }
        pairs = [(aggregate_cross_attention(f["CA"]), f[name]) for f in found]
        rho[name]["spearman"] = mean(float(explanation_correlation(a, s, method="spearman")) for a, s in pairs)
        rho[name]["frame norm"] = mean(float(explanation_correlation(a, s, frame_norm=True)) for a, s in pairs)
        rho[name]["X, frame means"] = mean(
            float(explanation_correlation(a, pool_saliency(f["whole"], a.shape[-1], "max_mean")))
            for (a, _), f in zip(pairs, found, strict=True)
        )
    rho["SM-X, SM-H"] = mean(float(explanation_correlation(f["SM-H"], f["SM-X"])) for f in found)
    hits = []
    for f, starts in zip(found, heard.starts, strict=True):
        frame = f["whole"].amax(2).argmax(1)
        hits += [bool(s <= t < s + SPAN) for t, s in zip(frame.tolist(), starts.tolist(), strict=True)]
    return rho, mean(hits)


# --- deletion -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _decode(model: Any, features: Tensor, length: int) -> Tensor:
    """Greedily, (B, I)."""
    states = model.get_encoder()(features)
    ids = torch.full((len(features), 1), _START)
    for _ in range(length):
        ids = torch.cat([ids, model(encoder_outputs=states, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, 1:] - _SPECIAL


def _deletion(
    model: nn.Module, heard: Utterances, found: list[dict[str, Any]], g: torch.Generator, on_one: Callable[[int], None]
) -> Mapping[str, tuple[list[float], list[float], float]]:
    """By explanation: percentages, mean scores and mean area."""
    curves: dict[str, list[Any]] = {name: [] for name in _CURVES}
    for i, f in enumerate(found):
        on_one(i)
        spec, tokens = heard.features[i], heard.tokens[i]
        attention = aggregate_cross_attention(f["CA"]).repeat_interleave(SPAN, 1)[:, : len(spec)]
        relevance = {
            "input saliency": f["whole"].amax(2),
            "cross-attention": attention,
            "random": torch.rand(len(spec), generator=g),
        }
        for name, of_frames in relevance.items():

            def score(gone: Tensor, spec: Tensor = spec, tokens: Tensor = tokens) -> float:
                got = _decode(model, hide(spec, gone[None]), len(tokens))[0]
                return float((got == tokens).float().mean())

            curves[name].append(deletion_curve(score, of_frames))
    return {
        name: (
            some[0].percentages.tolist(),
            torch.stack([curve.scores for curve in some]).mean(0).tolist(),
            mean(auc(curve) for curve in some),
        )
        for name, some in curves.items()
    }


# --- the page -----------------------------------------------------------------------------------------------------


def _example(heard: Utterances, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figure shows of the first utterance; saliency of one token in the middle."""
    token = heard.tokens.shape[1] // 2
    f = found[0]

    def numbers(t: Tensor) -> Any:
        return [[round(v, 3) for v in row] for row in t.tolist()]

    return {
        "spectrogram": numbers(heard.features[0].T),
        "starts": heard.starts[0].tolist(),
        "token": token,
        "saliency": numbers(f["whole"][token].T),
        "attention": numbers(aggregate_cross_attention(f["CA"])),
        "SM-X": numbers(f["SM-X"]),
        "SM-H": numbers(f["SM-H"]),
    }


def _claims(data: dict[str, Any]) -> list[Claim]:
    rho, areas = data["correlations"], data["areas"]
    x, h = rho["SM-X"], rho["SM-H"]
    best = max(value for row in x["heads"] for value in row)

    def table(values: list[list[float]]) -> str:
        return "; ".join(", ".join(f"{v:.2f}" for v in row) for row in values)

    return [
        Claim(
            "tokens of fresh utterances that are right",
            "the task is learnt",
            f"{data['accuracy']:.1%}",
            data["accuracy"] > 0.95,
        ),
        Claim(
            "tokens whose input saliency is largest in the four frames where they are spoken",
            "≥ 95%",
            f"{data['hits']:.1%}",
            data["hits"] >= 0.95,
        ),
        Claim(
            "correlation of mean cross-attention with SM-H, with SM-X",
            "SM-H > SM-X > 0.3",
            f"{h['all']:.2f}, {x['all']:.2f}",
            h["all"] > x["all"] > 0.3,
        ),
        Claim(
            "the same where all cross-attention is uniform",
            "within 0.05 of 0",
            f"{rho['uniform']:.2f}",
            abs(rho["uniform"]) < 0.05,
        ),
        Claim(
            "ρ of all heads together with SM-X, with SM-H",
            "about half: ρ with SM-X at most about 0.6, and 0.5 to 0.75 with SM-H",
            f"{x['all']:.2f}, {h['all']:.2f}",
            x["all"] < 0.7 and 0.45 < h["all"] < 0.8,
        ),
        Claim(
            "ρ with SM-X of each layer's mean over heads",
            "later layers align better",
            ", ".join(f"{v:.2f}" for v in x["layers"]),
            all(a < b for a, b in pairwise(x["layers"])),
        ),
        Claim(
            "ρ with SM-X of each head, by layer",
            "the mean of all is better than most",
            table(x["heads"]),
            x["all"] > sorted(v for row in x["heads"] for v in row)[len(x["heads"]) * len(x["heads"][0]) // 2],
        ),
        Claim("ρ with SM-H of each head, by layer", "", table(h["heads"])),
        Claim(
            "the best single head, and the mean of all, with SM-X",
            "averaging helps",
            f"{best:.2f}, {x['all']:.2f}",
            x["all"] >= best,
        ),
        Claim("Spearman's, with SM-X and SM-H", "", f"{x['spearman']:.2f}, {h['spearman']:.2f}"),
        Claim(
            "attention normalised per frame, with SM-X and SM-H", "", f"{x['frame norm']:.2f}, {h['frame norm']:.2f}"
        ),
        Claim(
            "SM-X by mean over frames instead of maximum",
            "maximum is better",
            f"{x['X, frame means']:.2f}, {x['all']:.2f}",
            x["all"] > x["X, frame means"],
        ),
        Claim("SM-H with SM-X", "", f"{rho['SM-X, SM-H']:.2f}"),
        Claim(
            "area under the deletion curve: input saliency, cross-attention, random frames",
            "input saliency is the most faithful, attention better than chance",
            ", ".join(f"{areas[name]:.1f}" for name in _CURVES),
            areas["input saliency"] < areas["cross-attention"] < areas["random"],
        ),
    ]


def draw(finding: Finding) -> "Figure":
    """One utterance: what was heard, what one token depends on, where tokens look; then heads and deletion."""
    figure: Figure = require("matplotlib.figure", "draw the figure").Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4)
    data, example = finding.data, finding.data["example"]
    rectangle = require("matplotlib.patches", "draw the figure").Rectangle
    top = len(example["spectrogram"])
    panels = (
        ("spectrogram", "heard; spans of the tokens"),
        ("saliency", f"SM-X of token {example['token']}, standardised"),
    )
    for axis, (key, title) in zip(axes[0], panels, strict=False):
        axis.imshow(example[key], origin="lower", aspect="auto", cmap="magma")
        for i, start in enumerate(example["starts"]):
            if key == "spectrogram" or i == example["token"]:
                axis.add_patch(rectangle((start - 0.5, -0.5), SPAN, top, fill=False, edgecolor="cyan", linewidth=1))
        axis.set(xlabel="frame", ylabel="channel")
        axis.set_title(title, fontsize=10)
    maps = (("attention", "mean cross-attention"), ("SM-H", "SM-H"), ("SM-X", "SM-X, pooled"))
    for axis, (key, title) in zip((axes[0, 2], axes[0, 3], axes[1, 0]), maps, strict=True):
        axis.imshow(example[key], aspect="auto", cmap="magma")
        axis.plot([s // SPAN for s in example["starts"]], range(len(example["starts"])), "c+", markersize=7)
        axis.set(xlabel="encoder frame", ylabel="token")
        axis.set_title(title, fontsize=10)
    for axis, name in zip((axes[1, 1], axes[1, 2]), ("SM-X", "SM-H"), strict=True):
        values = data["correlations"][name]["heads"]
        axis.imshow(values, vmin=-0.2, vmax=1, cmap="viridis", aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axis.set(xlabel="head", ylabel="layer", xticks=range(len(values[0])), yticks=range(len(values)))
        axis.set_title(f"ρ of each head with {name}; of the mean {data['correlations'][name]['all']:.2f}", fontsize=10)
    for name, colour in _CURVES.items():
        axes[1, 3].plot(
            data["percentages"], data["curves"][name], color=colour, label=f"{name} ({data['areas'][name]:.1f})"
        )
    axes[1, 3].set(xlabel="% of frames taken away", ylabel="tokens right")
    axes[1, 3].set_title("deletion (area)", fontsize=10)
    axes[1, 3].legend(fontsize=8)
    return figure
