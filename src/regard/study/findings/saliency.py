"""Saliency maps of a small network and a vision transformer: do they point at the class, does it hang on them?"""

import base64
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import require
from regard.probes import class_sensitivity, linear_approx, normgrad, pointing_game
from regard.study import attribution, models
from regard.study import saliency_subjects as subjects
from regard.study.finding import Claim, Finding, Progress
from regard.tasks.images import TEXTURES
from regard.tasks.objects import Objects

#: ReLUs of the small network
_LAYERS = ("1", "4", "7", "9")
_FULL = {
    "steps": 300, "pictures": 200, "scored": 50, "portions": 16,
    "vit_side": 84, "vit_train": 320, "vit_pictures": 10, "vit_portions": 5,
}  # fmt: skip
_QUICK = {
    "steps": 10, "pictures": 4, "scored": 2, "portions": 2,
    "vit_side": 56, "vit_train": 2, "vit_pictures": 1, "vit_portions": 1,
}  # fmt: skip
_SHOWN, _SIDE = 3, 32
_AREAS = (
    ("z", "raw", "LRP z"),
    ("z", "salient", "salient relevance"),
    ("z+", "raw", "LRP z+"),
    ("z+", "salient", "salient relevance, z+"),
)
_SCORES = {"pointing": "pointing game", "insertion": "insertion", "deletion": "deletion"}


def run(*, seed: int = 0, quick: bool = False, on_progress: Progress | None = None) -> Finding:
    """Train the small network and a probe on the transformer; then maps, scores and class sensitivity."""
    size = _QUICK if quick else _FULL
    say = on_progress or (lambda *_: None)
    data: dict[str, Any] = {
        "cnn": _convolutions(size, seed, lambda what, done: say(f"small network: {what}", done, 20)),
        "vit": _transformer(size, seed, lambda what, done: say(f"ViT-S/14: {what}", 10 + done, 20)),
    }
    say("done", 20, 20)
    cnn, vit = data["cnn"], data["vit"]
    rho, random = cnn["rho"]["trained"], cnn["rho"]["random"]
    best = cnn["normgrad"]["product of the last three"]
    early, last = rho["NormGrad"][0], rho["NormGrad"][-1]
    areas = cnn["areas"]
    claims = [
        Claim(
            "small network: both classes found, share of pictures", "> 0.95", f"{cnn['both']:.3f}", cnn["both"] > 0.95
        ),
        Claim(
            "NormGrad, last layers together: maximum in the right half",
            "> 0.9",
            f"{_pm(best)}; last layer alone {_pm(cnn['normgrad'][_LAYERS[-1]])}",
            best[0] > 0.9,
        ),
        Claim("class sensitivity ρ of NormGrad, first layer", "> 0.9", f"{early:.2f}", early > 0.9),
        Claim("class sensitivity ρ of NormGrad, last layer", "< 0.5", f"{last:.2f}", last < 0.5),
        Claim(
            "class sensitivity ρ of the linear approximation, last layer",
            "below NormGrad's",
            f"{rho['linear approximation'][-1]:.2f}",
            rho["linear approximation"][-1] < last,
        ),
        Claim(
            "ρ of NormGrad with random weights, by layer",
            "near 1",
            ", ".join(f"{r:.2f}" for r in random["NormGrad"]),
            min(random["NormGrad"]) > 0.9,
        ),
        *(
            Claim(
                f"mass of the highest 20 % inside the object's box, LRP {rule}: salient relevance beside raw",
                "higher",
                f"{_pm(areas[rule]['salient'])} beside {_pm(areas[rule]['raw'])}",
                areas[rule]["salient"][0] > areas[rule]["raw"][0],
            )
            for rule in areas
        ),
    ]
    for name, found in (("small network", cnn), ("ViT-S/14", vit)):
        table, guess = found["scores"], found["scores"]["random"]
        for score, title in _SCORES.items():
            sign = -1 if score == "deletion" else 1
            ranked = sorted((n for n in table if n != "random"), key=lambda n: -sign * table[n][score][0])
            ahead = [n for n in ranked if sign * _apart(table[n][score], guess[score]) > 2]
            claims.append(
                Claim(
                    f"{name}, {title}: methods beyond random maps by two standard errors",
                    "all",
                    f"{len(ahead)} of {len(ranked)}; best {ranked[0]} {_pm(table[ranked[0]][score])}, "
                    f"worst {ranked[-1]} {_pm(table[ranked[-1]][score])}, random {_pm(guess[score])}",
                    len(ahead) == len(ranked),
                )
            )
    return Finding(
        name="saliency",
        title="Saliency maps: where they point, and what the class hangs on",
        systems=("normgrad", "salient-relevance"),
        summary=_SUMMARY.format(
            cnn=cnn["weights"], shown=cnn["count"], vit=vit["label"], looks=vit["count"], probe=f"{vit['both']:.2f}"
        ),
        claims=tuple(claims),
        settings={**size},
        data=data,
    )


_SUMMARY = """
A network of four convolutions ({cnn:,} weights) learns to say which of six kinds of object a picture shows, each kind
for itself, as the networks of arXiv:2004.02866 do on photos. Asked on {shown} unseen pictures with one object of
different classes in either half, a map is right where its maximum lies in the box of the object that it was asked for
(pointing game). Insertion and deletion show the class's probability while pixels come and go in the map's order,
against the picture's mean colour; averaged are the areas under the curves. Intervals are two standard errors.

{vit}, frozen, is asked in the same way through a linear layer on the mean of its patch tokens.
That layer is trained on pictures whose halves show two of eight textures, real photos, and asked about other parts of
them ({looks} pictures; both textures named in a share of {probe}).

NormGrad multiplies its maps of the last three layers, Grad-CAM and the linear approximation look at the last one. LRP
and the maps made of it exist for plain convolutional networks only, attention rollout for transformers only.
"""


def _pm(value: tuple[float, float]) -> str:
    return f"{value[0]:.3f} ± {2 * value[1]:.3f}"


def _apart(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The difference in standard errors."""
    error = (a[1] ** 2 + b[1] ** 2) ** 0.5
    return (a[0] - b[0]) / error if error else 0.0


def _convolutions(size: Mapping[str, int], seed: int, say: Callable[[str, int], None]) -> dict[str, Any]:
    task = Objects()
    say("training", 0)
    model = subjects.folded(subjects.trained(Objects(single=0.3), size["steps"], seed))
    test = task.batch("test", 0, size["pictures"], seed)
    x = 2 * test.images - 1
    with torch.no_grad():
        right = ((model(x) > 0) == test.labels).all(1).double().mean()
    half = (torch.arange(task.size) < task.size // 2).expand(len(x), task.size, -1)
    say("NormGrad by layer", 3)
    settings = {**{layer: (layer,) for layer in _LAYERS}, "product of the last three": _LAYERS[1:]}
    pointed = {}
    for name, layers in settings.items():
        maps_of = (normgrad(model, x, test.classes[:, i], layers) for i in (0, 1))
        hits = [pointing_game(found, side) for found, side in zip(maps_of, (half, ~half), strict=True)]
        pointed[name] = attribution.mean_and_error(torch.cat(hits))
    torch.manual_seed(seed)
    nets = {"trained": model, "random": subjects.folded(subjects.small_network())}
    kinds: dict[str, Any] = {"NormGrad": normgrad, "linear approximation": linear_approx}
    rho = {
        who: {
            kind: [class_sensitivity(partial(make, layers=[at]), net, x) for at in _LAYERS]
            for kind, make in kinds.items()
        }
        for who, net in nets.items()
    }

    say("maps", 4)
    few = slice(0, size["scored"])
    target = test.classes[few].T.flatten()
    pictures, boxes = x[few].repeat(2, 1, 1, 1), test.boxes[few].transpose(0, 1).flatten(0, 1)
    methods = attribution.for_convolutions(_LAYERS[1:], window=6, seed=seed)
    maps = {name: make(model, pictures, target) for name, make in methods.items()}
    table = attribution.scores(
        model, pictures, target, maps, boxes, steps=size["portions"], on_method=lambda name: say(f"scores of {name}", 6)
    )
    say("areas", 9)
    alone = Objects(single=1.0).batch("test", 1, size["scored"], seed)
    rows, at = torch.arange(len(alone.images)), (alone.classes >= 0).long().argmax(1)
    shown, wanted, box = 2 * alone.images - 1, alone.classes[rows, at], alone.boxes[rows, at]
    areas: dict[str, Any] = {"z": {}, "z+": {}}
    for rule, kind, name in _AREAS:
        areas[rule][kind] = attribution.mean_and_error(
            attribution.mass_inside(methods[name](model, shown, wanted), box)
        )
    return {
        "weights": sum(p.numel() for p in model.parameters()), "count": len(x), "both": float(right),
        "normgrad": pointed, "rho": rho, "areas": areas, "scores": table, "gallery": _gallery((pictures + 1) / 2, maps),
    }  # fmt: skip


def _transformer(size: Mapping[str, int], seed: int, say: Callable[[str, int], None]) -> dict[str, Any]:
    loaded = models.load_vision("vit-s")
    side = size["vit_side"]
    model = subjects.Probed(loaded.network, len(TEXTURES)).eval()
    say("training the linear layer", 0)
    subjects.fit(model, *subjects.halves("train", size["vit_train"], side, seed)[:2], seed)
    x, labels, classes = subjects.halves("test", size["vit_pictures"], side, seed)
    network: Any = loaded.network
    depth = network.config.num_hidden_layers
    layers = [f"network.encoder.layer.{i}" for i in (depth // 2 - 1, 3 * depth // 4 - 1, depth - 2)]
    with torch.no_grad():
        right = ((model(x) > 0) == labels).all(1).double().mean()
    target, pictures = classes.T.flatten(), x.repeat(2, 1, 1, 1)
    half = torch.arange(side) < side // 2
    inside = torch.stack([half, ~half])[:, None, None].expand(2, len(x), side, side).flatten(0, 1)
    maps = {}
    methods = attribution.for_any(layers, window=28, ig_steps=6, seed=seed)
    for name, make in methods.items():
        say(name, 2)
        maps[name] = torch.cat([make(model, *one) for one in zip(pictures.split(4), target.split(4), strict=True)])
    maps["attention rollout"] = attribution.attention_rollout(loaded.network, pictures)
    table = attribution.scores(
        model,
        pictures,
        target,
        maps,
        inside,
        steps=size["vit_portions"],
        on_method=lambda name: say(f"scores of {name}", 6),
    )
    return {
        "label": loaded.label, "count": len(x), "both": float(right), "scores": table,
        "gallery": _gallery(_grey(pictures), maps),
    }  # fmt: skip


# --- the figure -------------------------------------------------------------------------------------------------------


def _grey(x: Tensor) -> Tensor:
    return (x * 0.25 + 0.5).clamp(0, 1)


def _gallery(pictures: Tensor, maps: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The first picture asked for both its classes, and others for one, as bytes; 32 × 32 pixels each."""
    count = len(pictures) // 2
    rows = [0, count, *range(1, min(_SHOWN, count))]

    def bytes_of(x: Tensor) -> str:
        small = F.interpolate(x[None], (_SIDE, _SIDE), mode="bilinear", antialias=True)[0].clamp(0, 1)
        return base64.b64encode((255 * small).byte().numpy().tobytes()).decode()

    def unit(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)

    shown = {"picture": [bytes_of(pictures[i]) for i in rows]}
    return shown | {name: [bytes_of(unit(found[i])[None]) for i in rows] for name, found in maps.items()}


def draw(finding: Finding) -> Any:
    """A row per method: its maps of a few pictures, and its scores; a block per network."""
    plt = require("matplotlib.pyplot", "draw the figure")
    parts = [("four convolutions", finding.data["cnn"]), (finding.data["vit"]["label"], finding.data["vit"])]
    figure = plt.figure(figsize=(16, 9))
    for block, (title, data) in zip(figure.subfigures(1, 2), parts, strict=True):
        _block(block, title, data)
    return figure


def _block(figure: Any, title: str, data: Mapping[str, Any]) -> None:
    numpy = require("numpy", "draw the figure")
    names, columns = list(data["scores"]), len(data["gallery"]["picture"])
    grid = figure.add_gridspec(len(names) + 1, columns + 6, left=0.2, right=0.98, top=0.93, bottom=0.06)
    figure.suptitle(f"{title}; the first two columns ask for the left and the right of one picture", fontsize=9)
    for row, name in enumerate(["picture", *names]):
        for column, text in enumerate(data["gallery"][name]):
            axis = figure.add_subplot(grid[row, column])
            pixels = numpy.frombuffer(base64.b64decode(text), numpy.uint8).reshape(-1, _SIDE, _SIDE)
            axis.imshow(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0], cmap="magma")
            axis.set(xticks=[], yticks=[])
            if not column:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for i, (score, label) in enumerate(_SCORES.items()):
        axis = figure.add_subplot(grid[1:, columns + 2 * i : columns + 2 * i + 2])
        means, errors = zip(*(data["scores"][name][score] for name in names), strict=True)
        axis.barh(range(len(names)), means, xerr=[2 * error for error in errors], color="#4477aa", ecolor="#444444")
        axis.axvline(means[names.index("random")], color="#cc3311", linewidth=1)
        axis.set(ylim=(len(names) - 0.5, -0.5), yticks=[], xlim=(0, 1.05), xticks=(0, 0.5, 1))
        axis.set_title(f"{label}\n{'lower' if score == 'deletion' else 'higher'} is better", fontsize=7)
        axis.tick_params(labelsize=7)
