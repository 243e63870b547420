"""Heads of vision transformers: which matter, how far they look, and what patterns they use (arXiv:2303.13731)."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import require
from regard.probes.pattern_clusters import AttentionPatternAutoencoder, pattern_summary
from regard.probes.recorder import record
from regard.probes.vit_heads import Head, HeadImportance, attention_strength, hop_rings, rank_heads, recorded_maps
from regard.study import models
from regard.study.finding import Claim, Finding, Progress
from regard.tasks.images import Digits, ImageTask, Patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = ("prob_drop", "jsd", "flip")
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
_DRAWS = 10
#: photos with colours that come inside scikit-image and scikit-learn
_PHOTOS = (
    "astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry", "motorcycle",
    "china", "flower",
)  # fmt: skip
_STEADY = 0.9  # of a head's maps in one cluster


@dataclass(frozen=True)
class _Subject:
    """A model and what it is looked at with: pictures to rank heads by, others to count answers, others for maps."""

    label: str
    network: nn.Module
    output: Callable[[Tensor], Tensor]
    grid: int
    ranking: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    pictures: Tensor


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """A pretrained ViT-S/14 with a linear probe, and a small ViT trained here; about six minutes."""
    report = on_progress or (lambda what, done, total: None)
    report("load and train", 0, 6)
    subjects = [_pretrained(seed, quick), _trained(seed, quick)]
    found = []
    for i, subject in enumerate(subjects):

        def told(what: str, later: int = 0, i: int = i) -> None:
            report(f"{subjects[i].label}: {what}", 1 + 2 * i + later, 6)

        found.append(_analysed(subject, seed, quick, told))
    report("families of maps", 5, 6)
    ari = _families(20 if quick else 200, 2 if quick else 15, seed)
    label, vit = subjects[0].label, subjects[0].network
    tokens = HeadImportance(vit, ("cosine",), output=lambda x: vit(pixel_values=x).pooler_output)
    cosine = tokens(subjects[0].pictures[: 1 if quick else 10])["cosine"]
    agreement = {"cosine": _spearman(cosine, torch.tensor(found[0]["importance"]["jsd"]))}
    data = {"models": found, "ari": ari, "agreement": agreement, "cosine": _rounded(cosine, 6)}
    report("done", 6, 6)
    return Finding(
        name="vit-head-analytics",
        title="Heads of vision transformers: importance, reach and patterns",
        systems=("vit-head-analytics",),
        summary=_SUMMARY.format(label=label),
        claims=tuple(_claims(data)),
        settings={
            "draws": _DRAWS,
            "pictures to rank by": ", ".join(str(len(s.ranking[0])) for s in subjects),
            "held out": ", ".join(str(len(s.held_out[0])) for s in subjects),
            "pictures for maps": ", ".join(str(len(s.pictures)) for s in subjects),
            "pixels": ", ".join(str(s.pictures.shape[-1]) for s in subjects),
        },
        data=data,
    )


_SUMMARY = """
Two vision transformers with 7 × 7 patches and a class token. {label} (12 layers × 6 heads, pretrained, here on pictures
of 98 pixels) answers by a linear probe on its class token, fitted by ridge regression to tell eight textures apart
(patches of photos; training patches come from the left three quarters of each photo, test patches from the rest). The
second (4 layers × 4 heads, 64 channels) was trained here on scikit-learn's 8×8 digits, enlarged to 28 pixels.

A head's importance is what the answers lose when its output is zero: probability of the predicted class, Jensen-Shannon
divergence, share of changed decisions. Heads are ranked by the divergence on training pictures and removed in that
order; accuracies are of test pictures, and {label} is also ranked by how far its class token turns on whole photos.
Reach is counted in hops on the patch grid, over the maps of whole colour photos and their middles (or of test digits).
Patterns are two-dimensional codes of single maps from a convolutional autoencoder, grouped by k-means with the number
of groups chosen by silhouette.
"""


def _pretrained(seed: int, quick: bool) -> _Subject:
    vit = models.load_vision("vit-s")
    assert vit.saliency is not None  # this model brings one, which knows the size of the patches
    grid = 4 if quick else 7
    size = grid * vit.saliency.patch_size
    task = Patches("texture", size=size)
    probe = _linear_probe(vit.network, [_rgb(task.batch("train", i, 32, seed)) for i in range(1 if quick else 8)])

    def output(x: Tensor) -> Tensor:
        return probe(vit.network(pixel_values=x).pooler_output)

    ranking = _rgb(task.batch("train", 1000, 4 if quick else 32, seed))
    held_out = _rgb(task.batch("test", 0, 8 if quick else 96, seed))
    crop = type(vit.preprocess)(size, vit.preprocess.mean, vit.preprocess.std, fit="crop")
    photos = [_photo(name) for name in _PHOTOS[: 2 if quick else None]]
    pictures = crop([*photos, *(_middle(photo) for photo in photos)])
    return _Subject(vit.label, vit.network, output, grid, ranking, held_out, pictures)


def _trained(seed: int, quick: bool) -> _Subject:
    transformers = require("transformers", "build the vision transformer")
    task: ImageTask = Digits("8x8", size=28)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=28,
            patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config).train()
    steps = 20 if quick else 500
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images, targets = task.batch("train", step, 64, seed)
        loss = nn.functional.cross_entropy(model(images).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    ranking, test = task.batch("train", 10_000, 256, seed), task.batch("test", 0, task.test_size)
    pictures = test.images[: 8 if quick else 60]
    label = "ViT trained here on digits"
    return _Subject(label, model, lambda x: model(x).logits, 7, ranking, test, pictures)


@torch.no_grad()
def _analysed(subject: _Subject, seed: int, quick: bool, told: Callable[..., None]) -> dict[str, Any]:
    """Importance, pruning curves, reach and patterns of one model, as JSON holds them."""
    count = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return subject.output(x)

    analysis = HeadImportance(subject.network, _METRICS, output=counted, batch_size=512)
    importance = analysis(subject.ranking[0], on_progress=lambda done, total: told(f"pass {done} of {total}"))
    forwards = count
    order = rank_heads(importance["jsd"])
    images, answers = subject.held_out

    def accuracy(heads: Sequence[Head]) -> float:
        return (analysis.pruned(images, heads).argmax(-1) == answers).double().mean().item()

    shares = (0.25,) if quick else _SHARES
    removed = [round(share * len(order)) for share in shares]
    generator = torch.Generator().manual_seed(seed)
    draws = 2 if quick else _DRAWS
    random = [[order[i] for i in torch.randperm(len(order), generator=generator)] for _ in range(draws)]
    quarter = round(len(order) / 4)
    told("patterns", 1)
    recording = record(subject.network, {"pixel_values": subject.pictures}, queries=range(1 + subject.grid**2))
    maps = recorded_maps(recording)  # (layers, B, heads, N, N)
    strength = attention_strength(maps, subject.grid)
    per_key = attention_strength(maps, subject.grid, normalise="mean")
    return {
        "label": subject.label,
        "forwards": forwards,
        "importance": {name: _rounded(t, 6) for name, t in importance.items()},
        "accuracy": accuracy([]),
        "removed": removed,
        "least": [accuracy(order[:k]) for k in removed],
        "most": [accuracy(order[len(order) - k :]) for k in removed],
        "random": [accuracy(heads[:quarter]) for heads in random],
        "strength": _rounded(strength.S.mean(1)),
        "per_key": _rounded(per_key.S.mean(1)),
        "ring_sizes": _rounded(strength.ring_sizes),
        "distance": _rounded(strength.mean_distance),
        "even_distance": _even_distance(subject.grid),
        "class_token": {name: _rounded(t.mean(-1)) for name, t in strength.cls_entries.items()},
        "patterns": _patterns(maps, seed, 2 if quick else 15),
    }


def _patterns(maps: Tensor, seed: int, epochs: int) -> dict[str, Any]:
    layers, batch, heads, n, _ = maps.shape
    flat = maps.transpose(1, 2).flatten(0, 2)  # head after head, its pictures together
    coder = AttentionPatternAutoencoder(n, seed=seed)
    errors = coder.fit(flat, epochs=epochs)
    codes = coder.encode(flat)
    of_head = torch.arange(layers * heads).repeat_interleave(batch)
    found = pattern_summary(codes, maps=flat, heads=of_head, max_k=6, seed=seed)
    assert found.histogram is not None
    assert found.mean_maps is not None
    shown = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))[:400]
    return {
        "error": errors[-1],
        "variance": coder.prepare(flat).var(0).mean().item(),
        "silhouettes": {str(k): round(value, 3) for k, value in found.silhouettes.items()},
        "sizes": found.labels.bincount().tolist(),
        "codes": _rounded(torch.cat([codes[shown], found.labels[shown, None].float()], 1), 2),
        "mean_maps": [_packed(m) for m in found.mean_maps],
        "clusters_by_head": _rounded(found.histogram.unflatten(0, (layers, heads)), 3),
        "top_share": _rounded(found.histogram.amax(1).unflatten(0, (layers, heads)), 3),
    }


def _families(each: int, epochs: int, seed: int) -> float:
    """Adjusted Rand index of five known families of maps (own row, column, place, neighbours, all alike)."""
    metrics = require("sklearn.metrics", "compare clusters")
    g = torch.Generator().manual_seed(seed)
    rings = hop_rings(7, 7)
    place = torch.arange(49)
    row, column = place // 7, place % 7
    kinds = (row[:, None] == row, column[:, None] == column, rings[0], rings[0] | rings[1], rings.any(0))
    logits = torch.stack([(kind + 1e-3).log() for kind in kinds]).repeat_interleave(each, 0)
    maps = (logits + 0.5 * torch.randn(logits.shape, generator=g)).softmax(-1)
    coder = AttentionPatternAutoencoder(49, seed=seed)
    coder.fit(maps, epochs=epochs)
    labels = pattern_summary(coder.encode(maps), 5, seed=seed).labels
    return float(metrics.adjusted_rand_score(torch.arange(5).repeat_interleave(each), labels))


@torch.no_grad()
def _linear_probe(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], ridge: float = 10.0) -> nn.Module:
    """From the class token to scores, by ridge regression to one-hot answers; scores are scaled to be logits."""
    x = torch.cat([network(pixel_values=images).pooler_output for images, _ in batches])
    y = nn.functional.one_hot(torch.cat([targets for _, targets in batches])).float()
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    z = (x - centre) / scale
    weight = torch.linalg.solve(z.T @ z + ridge * torch.eye(z.shape[1]), z.T @ (y - y.mean(0)))
    probe = nn.Linear(*weight.shape)
    sharpness = 10.0  # a share of one for the right class becomes ten nats
    probe.weight.copy_(sharpness * (weight / scale[:, None]).T)
    probe.bias.copy_(sharpness * (y.mean(0) - (centre / scale) @ weight))
    return probe


def _rgb(batch: Any) -> tuple[Tensor, Tensor]:
    """Grey pictures of mean 0 and variance 1 are what the network reads, once per colour."""
    return batch.images.expand(-1, 3, -1, -1), batch.targets


def _photo(name: str) -> Any:
    if name in ("china", "flower"):
        return require("sklearn.datasets", "read photos").load_sample_image(f"{name}.jpg")
    data = require("skimage.data", "read photos")
    return data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()


def _middle(pixels: Any) -> Any:
    height, width = pixels.shape[:2]
    return pixels[height // 4 : height - height // 4, width // 4 : width - width // 4]


def _even_distance(grid: int) -> float:
    """Mean hops of attention that is the same everywhere."""
    shares = hop_rings(grid, grid).double().mean((1, 2))
    return float(shares @ torch.arange(grid).double())


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([t.flatten().argsort(stable=True).argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _rounded(tensor: Tensor, digits: int = 4) -> Any:
    return np.round(tensor.double().numpy(force=True), digits).tolist()


def _packed(map_: Tensor) -> str:
    """A map as bytes, 255 at its largest weight, row by row."""
    return b64encode((255 * map_ / map_.max()).round().to(torch.uint8).numpy().tobytes()).decode()


def _claims(data: dict[str, Any]) -> list[Claim]:
    claims = []
    for model in data["models"]:
        label, jsd = model["label"], torch.tensor(model["importance"]["jsd"])
        at = next(i for i, k in enumerate(model["removed"]) if k == round(jsd.numel() / 4))
        least, most, random = model["least"][at], model["most"][at], model["random"]
        curve = ", ".join(f"{a:.0%}" for a in model["least"])
        counts = ", ".join(map(str, model["removed"]))
        rank = _spearman(torch.tensor(model["importance"]["prob_drop"]), jsd)
        distance = [mean(layer) for layer in model["distance"]]
        share = torch.tensor(model["patterns"]["top_share"])
        steady = float((share >= _STEADY).double().mean())
        sizes = model["patterns"]["sizes"]
        silhouette = model["patterns"]["silhouettes"][str(len(sizes))]
        claims += [
            Claim(
                f"{label}: forward passes for the importance of {jsd.numel()} heads",
                "one per head and one more",
                str(model["forwards"]),
                model["forwards"] == jsd.numel() + 1,
            ),
            Claim(
                f"{label}: accuracy without a quarter of the heads ({model['accuracy']:.1%} with all)",
                "the least important cost less than random ones, and those less than the most important",
                f"least {least:.1%}, random {mean(random):.1%} ± {stdev(random):.1%}, most {most:.1%}",
                least > mean(random) > most,
            ),
            Claim(f"{label}: accuracy without the {counts} least important heads", "no figure published", curve),
            Claim(
                f"{label}: rank correlation of probability drop and divergence",
                "measures of one thing: above 0.5",
                f"{rank:.2f}",
                rank > 0.5,
            ),
            Claim(
                f"{label}: share of all divergence that heads of one layer cause",
                f"{1 / len(jsd):.0%} if all layers mattered alike",
                f"{float(jsd.sum(1).max() / jsd.sum()):.0%}, layer {int(jsd.sum(1).argmax())} of 0 to {len(jsd) - 1}",
            ),
            Claim(
                f"{label}: mean hops between patches that attend, first to last layer",
                f"{model['even_distance']:.2f} where attention is even",
                ", ".join(f"{d:.2f}" for d in distance),
            ),
            Claim(
                f"{label}: heads with {_STEADY:.0%} of their maps in one of {len(sizes)} clusters",
                "some heads are independent of the picture, others not",
                f"{steady:.0%} of the heads; silhouette {silhouette:.2f}, cluster sizes {', '.join(map(str, sizes))}",
                0 < steady < 1,
            ),
            Claim(
                f"{label}: variance of the maps that two-dimensional codes keep",
                "no figure published",
                f"{1 - model['patterns']['error'] / model['patterns']['variance']:.0%}",
            ),
        ]
    first = data["models"][0]["label"]
    return [
        *claims,
        Claim(
            f"{first}: rank correlation of the turn of the class token on photos with the divergence on textures",
            "no figure published",
            f"{data['agreement']['cosine']:.2f}",
        ),
        Claim(
            "adjusted Rand index of k-means on two-dimensional codes of five known families, 200 maps each",
            "above 0.9",
            f"{data['ari']:.3f}",
            data["ari"] > 0.9,
        ),
    ]


def draw(finding: Finding) -> "Figure":
    """A row for each model: importance, pruning, reach, codes, and the clusters' mean maps."""
    pyplot = require("matplotlib.figure", "draw the figure")
    figure: Figure = pyplot.Figure(figsize=(17, 7), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=(1.3, 1, 1.1, 1, 1.3))
    for row, model in enumerate(finding.data["models"]):
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        _draw_importance(axes[0], model)
        _draw_pruning(axes[1], model)
        _draw_reach(axes[2], model)
        _draw_codes(axes[3], model["patterns"])
        maps = model["patterns"]["mean_maps"]
        cells = grid[row, 4].subgridspec(2, -(-len(maps) // 2))
        for i, packed in enumerate(maps):
            cell = figure.add_subplot(cells[divmod(i, -(-len(maps) // 2))])
            pixels = np.frombuffer(b64decode(packed), np.uint8)
            side = round(len(pixels) ** 0.5)
            cell.imshow((pixels / 255).reshape(side, side) ** 0.5, cmap="magma")  # or only the largest would show
            cell.set(xticks=[], yticks=[])
            cell.set_title(f"cluster {i + 1}: {model['patterns']['sizes'][i]}", fontsize=8, color=f"C{i}")
    return figure


def _draw_importance(axes: Any, model: Any) -> None:
    blocks = [np.array(model["importance"][name]) for name in _METRICS]
    scaled = [block / max(block.max(), 1e-12) for block in blocks]
    axes.imshow(np.concatenate(scaled, 1), cmap="viridis", vmin=0, aspect="auto")
    heads = blocks[0].shape[1]
    for i in (1, 2):
        axes.axvline(i * heads - 0.5, color="white", linewidth=2)
    names = ("probability drop", "divergence", "changed decisions")
    labels = [f"{name}\nmax {block.max():.3g}" for name, block in zip(names, blocks, strict=True)]
    axes.set_xticks([heads * (i + 0.5) - 0.5 for i in range(3)], labels, fontsize=8)
    axes.set_yticks(range(len(blocks[0])))
    axes.set_ylabel("layer")
    axes.set_title(f"{model['label']}: importance of heads", fontsize=9)


def _draw_pruning(axes: Any, model: Any) -> None:
    removed = [0, *model["removed"]]
    for name, colour in (("least", "C2"), ("most", "C3")):
        axes.plot(removed, [model["accuracy"], *model[name]], "o-", color=colour, label=f"the {name} important first")
    total = np.array(model["importance"]["jsd"]).size
    random = model["random"]
    axes.plot([round(total / 4)] * len(random), random, "x", color="grey", label="random quarter")
    axes.set(xlabel="heads removed", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title("pruning", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.2)


def _draw_reach(axes: Any, model: Any) -> None:
    layers = range(len(model["distance"]))
    for layer in layers:
        axes.plot([layer] * len(model["distance"][layer]), model["distance"][layer], ".", color="C0", alpha=0.6)
    axes.plot(layers, [mean(d) for d in model["distance"]], "-", color="C0", label="mean distance (dots: heads)")
    axes.axhline(model["even_distance"], color="grey", linestyle=":", label="even attention")
    axes.set(xlabel="layer", ylabel="hops", ylim=(0, 1.7 * model["even_distance"]), xticks=layers)
    other = axes.twinx()
    strength = np.array(model["strength"])
    for hop, style in ((0, "-"), (1, "--")):
        other.plot(layers, strength[:, hop], style, color="C1", linewidth=1, label=f"mass at hop {hop}")
    other.set_ylim(0, 0.7)
    other.set_ylabel("mass", color="C1")
    lines = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(lines, [line.get_label() for line in lines], fontsize=7, loc="upper center", ncols=2)
    axes.set_title("reach of patches", fontsize=9)


def _draw_codes(axes: Any, patterns: Any) -> None:
    x, y, cluster = np.array(patterns["codes"]).T
    axes.scatter(x, y, c=[f"C{int(c)}" for c in cluster], s=6)
    axes.set(xticks=[], yticks=[])
    axes.set_title("codes of maps, by cluster", fontsize=9)
