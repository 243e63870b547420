"""Where a vision transformer looks: figures against eager attention, models of several libraries, and the page."""

import io
import math

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
import transformers
from PIL import Image

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.study import inspect_image as module
from regard.study.inspect_image import IMAGE_ROLES, image_role, inspect_image
from regard.study.inspect_page import data, render
from regard.study.vision_models import Preprocessing
from tests.study.visit import embedded, in_browser
from tests.timm_shim import timm

SIDE, LEADING = 6, 1
N = LEADING + SIDE * SIDE
PREPROCESS = Preprocessing(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), fit="crop")


def picture(height=60, width=90):
    """Waves of colour."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / 7 + y / 11), np.cos(x / 13), np.sin(y / 5)]
    return np.stack([(127 * channel + 128).astype(np.uint8) for channel in channels], -1)


def vit(cls=transformers.ViTModel, **changes):
    torch.manual_seed(0)
    config = cls.config_class(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=48, patch_size=8,
        initializer_range=0.3, attn_implementation="eager", **changes,
    )  # fmt: skip
    return cls(config).eval()


@pytest.fixture(scope="module")
def found():
    return inspect_image((vit(), PREPROCESS), image=picture())


@pytest.fixture(scope="module")
def weights():
    """(layers × (heads + 1), N, N), the last of a layer being the mean."""
    with torch.no_grad():
        every = torch.cat(vit()(PREPROCESS(picture()), output_attentions=True).attentions)
    return torch.cat([every, every.mean(1, keepdim=True)], 1).flatten(0, 1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def place(token):
    return divmod(token - LEADING, SIDE)


def test_patterns_equal_eager_attention(found, weights) -> None:
    assert (found.grid, found.leading, found.cells) == ((SIDE, SIDE), LEADING, (SIDE, SIDE))
    close(found.patterns, weights)
    close(found.received, weights.mean(1))
    assert found.layers == [0, 1, 2]


def test_figures_equal_eager_attention(found, weights) -> None:
    patches = range(LEADING, N)
    for unit, w in zip(found.units, weights.double(), strict=True):
        total = {"itself": 0.0, "row": 0.0, "column": 0.0, "near": 0.0, "first": 0.0, "far": 0.0, "patches": 0.0}
        for q in patches:
            total["first"] += float(w[q, :LEADING].sum())
            for k in patches:
                (a, b), (c, d) = place(q), place(k)
                share = float(w[q, k])
                total["itself"] += share * (q == k)
                total["row"] += share * (a == c)
                total["column"] += share * (b == d)
                total["near"] += share * (abs(a - c) <= 2 and abs(b - d) <= 2)
                total["far"] += share * math.hypot(a - c, b - d)
                total["patches"] += share
        shares = {name: value / len(patches) for name, value in total.items()}
        assert unit.distance == pytest.approx(total["far"] / total["patches"], abs=1e-3)
        assert unit.first == pytest.approx(shares["first"], abs=1e-4)
        assert unit.near == pytest.approx(shares["near"], abs=1e-4)
        same = sorted(w.sum(0)[LEADING:].tolist())[-4:]
        assert unit.same == pytest.approx(sum(same) / N, abs=1e-4)
        if unit.head is None:
            assert unit.role is None
            continue
        assert unit.entropy == pytest.approx(float(torch.special.entr(w).sum(-1).mean()), abs=1e-4)
        assert unit.role == image_role({**shares, "same": unit.same}, unit.entropy / math.log(N))


def test_flow_between_class_token_and_ninths(found, weights) -> None:
    assert found.regions[:3] == ["class token", "top left", "top"]
    assert found.regions[-1] == "bottom right"
    part = [0, *(1 + 3 * (3 * a // SIDE) + 3 * b // SIDE for a, b in map(place, range(LEADING, N)))]
    inside = torch.nn.functional.one_hot(torch.tensor(part)).float()
    close(found.flow, (inside / inside.sum(0)).T @ weights @ inside)


@pytest.mark.parametrize(
    ("shares", "role"),
    [
        ({"itself": 0.3, "row": 0.9}, "itself"),
        ({"row": 0.6, "column": 0.3, "near": 0.9}, "row"),
        ({"row": 0.3, "column": 0.6}, "column"),
        ({"row": 0.5, "column": 0.4, "near": 0.9}, "nearby"),
        ({"first": 0.3, "same": 0.9}, "class token"),
        ({"same": 0.4, "near": 0.9}, "same for all"),
        ({"entropy": 0.8}, "broad"),
        ({}, "mixed"),
    ],
)
def test_roles(shares, role) -> None:
    nothing = dict.fromkeys(("itself", "row", "column", "near", "first", "same"), 0.0)
    assert image_role({**nothing, **shares}, shares.get("entropy", 0.0)) == role
    assert role in IMAGE_ROLES


def test_the_picture_is_what_the_model_saw(found) -> None:
    shown = torch.from_numpy(np.asarray(Image.open(io.BytesIO(found.picture))).copy()).permute(2, 0, 1)
    assert shown.shape[-2:] == (48 * 14, 48 * 14)
    small = torch.nn.functional.interpolate(shown[None] / 255, 48, mode="area")[0]
    seen = PREPROCESS.restore(PREPROCESS(picture()))[0]
    assert float((small - seen).abs().mean()) < 0.02


def test_patches_are_pooled_where_the_page_has_no_room(weights, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PATTERN_BYTES", 15 * 10 * 10)
    pooled = inspect_image((vit(), PREPROCESS), image=picture())
    assert pooled.cells == (3, 3)
    group = [0, *(1 + 3 * (a // 2) + b // 2 for a, b in map(place, range(LEADING, N)))]
    inside = torch.nn.functional.one_hot(torch.tensor(group)).float()
    close(pooled.patterns, (inside / inside.sum(0)).T @ weights @ inside)
    close(pooled.received, weights.mean(1) @ inside)
    assert data(pooled)["groups"][:2] == ["class token", "patches in rows 1 to 2, columns 1 to 2"]
    monkeypatch.setattr(module, "_PATTERN_BYTES", 15 * 6 * 6)
    uneven = inspect_image((vit(), PREPROCESS), image=picture())
    assert uneven.cells == (2, 2)
    assert data(uneven)["groups"][-1] == "patches in rows 4 to 6, columns 4 to 6"


def test_registers_and_no_class_token() -> None:
    registers = inspect_image(
        (vit(transformers.Dinov2WithRegistersModel, mlp_ratio=2, num_register_tokens=3), PREPROCESS), image=picture()
    )
    assert registers.leading == 4
    assert registers.patterns.shape == (15, 40, 40)
    assert registers.regions[:2] == ["class token", "other tokens"]
    assert data(registers)["groups"][:5] == ["class token", "token 1", "token 2", "token 3", "patch in row 1, column 1"]
    none = inspect_image((vit(transformers.SiglipVisionModel), PREPROCESS), image=picture())
    assert none.leading == 0
    assert none.regions[0] == "top left"
    assert "class token" not in data(none)["overview"]
    assert all(unit.first == 0 for unit in none.units)


def test_timm() -> None:
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, depth=2, embed_dim=32, num_heads=4, num_classes=5
    ).eval()
    found = inspect_image((network, PREPROCESS), image=picture())
    assert (found.leading, found.grid) == (1, (6, 6))
    close(found.patterns.sum(-1), torch.ones(10, 37))


def test_a_folder_and_a_file(found, tmp_path) -> None:
    vit().save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(
        tmp_path / "model"
    )
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    read = inspect_image(tmp_path / "model", image=tmp_path / "picture.png")
    close(read.patterns, found.patterns)
    assert read.source == str(tmp_path / "picture.png")
    sideways = Image.fromarray(np.rot90(picture()).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    sideways.save(tmp_path / "turned.png", exif=exif)
    close(inspect_image(tmp_path / "model", image=tmp_path / "turned.png").patterns, found.patterns)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    plain = inspect_image((vit(), Preprocessing(48, (0.5,) * 3, (0.5,) * 3, fit="crop")), image=picture())
    close(inspect_image(tmp_path / "model", image=picture()).patterns, plain.patterns)


def test_the_bundled_model_and_a_photograph(vit_s) -> None:
    seen = []
    found = inspect_image(vit_s, on_progress=lambda *done: seen.append(done))
    assert seen == [(i + 1, 12) for i in range(12)]
    assert "astronaut" in found.source
    assert (found.grid, found.leading, len(found.units)) == ((16, 16), 1, 84)
    assert {"row", "column"} <= {unit.role for unit in found.units}
    assert len(render(found).encode()) < 15e6


def test_refusals(tmp_path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    pair = (vit(), PREPROCESS)
    with pytest.raises(ArgumentError, match=r"cannot read '.*text.png': it is no picture"):
        inspect_image(pair, image=tmp_path / "text.png")
    with pytest.raises(ArgumentError, match=r"nowhere.png': No such file or directory"):
        inspect_image(pair, image=tmp_path / "nowhere.png")
    with pytest.raises(ShapeError, match="images must be"):
        inspect_image(pair, image=np.zeros((4, 4), np.uint8))
    with pytest.raises(ArgumentError, match="model: cannot load 'no/such-model'"):
        inspect_image("no/such-model", image=picture())
    with pytest.raises(ArgumentError, match=r"expected|must be a name, a path or \(model, Preprocessing\), got tuple"):
        inspect_image((vit(), None), image=picture())
    with pytest.raises(Unsupported, match="a grid of 2 by 2 patches"):
        inspect_image((vit(), Preprocessing(16, (0.5,) * 3, (0.5,) * 3)), image=picture())
    sizes = {"image_size": 48, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    windows = transformers.SwinModel(transformers.SwinConfig(**sizes, window_size=3)).eval()
    with pytest.raises(Unsupported):
        inspect_image((windows, PREPROCESS), image=picture())


def test_plotly_knows_every_property_of_the_figures(found) -> None:
    read = embedded(render(found))
    shown = {**read["overview"], **{name: read[name] for name in ("pattern", "flow", "overlay")}}
    assert {"role", "same for all", "pattern", "flow", "overlay"} <= set(shown)
    shown |= {f"{name} {at}": figure for name, both in read["panels"].items() for at, figure in enumerate(both)}
    assert [len(shown[name]["data"]) for name in ("layers 0", "layers 1", "heads 0", "heads 1")] == [3, 3, 4, 4]
    for theme in read["themes"].values():
        for figure in shown.values():
            go.Figure({"data": figure["data"], "layout": {**figure["layout"], "template": theme}})


def test_what_comes_from_model_and_file_is_escaped(tmp_path) -> None:
    network = vit()
    network.config.name_or_path = "</script><script>alert(1)</script>"
    file = tmp_path / "<img src=x onerror=alert(2)>.png"
    Image.fromarray(picture()).save(file)
    source = render(inspect_image((network, PREPROCESS), image=file))
    assert "<script>alert" not in source
    assert "<img src=x" not in source
    assert source.count("</script>") == 4


@in_browser
def test_clicks_and_keys_in_a_browser(found, visit) -> None:
    page = visit(found)
    unit = page("state.unit")
    centre = LEADING + 3 * SIDE + 3
    assert page("state.query") == centre

    def shows(token):
        z = torch.tensor(page.z("overlay"))
        expected = found.patterns[page("state.unit"), token, LEADING:].view(SIDE, SIDE)
        assert bool(((z - expected).abs() <= 0.03 * expected + 2e-4).all())

    shows(centre)
    page.click("overlay", 1, 4)
    assert page("state.query") == LEADING + 4 * SIDE + 1
    shows(LEADING + 4 * SIDE + 1)
    assert "row 5, column 2" in page.text("#shown")

    page.page.locator("#from label", has_text="class token").click()
    shows(0)
    page.page.locator("#from label", has_text="all tokens").click()
    received = torch.tensor(page.z("overlay"))
    assert bool(((received - found.received[unit, 1:].view(SIDE, SIDE)).abs() < 0.01).all())

    page.click("overview", 2, 1)
    assert page.text("#head") == "Layer 1, head 2"
    assert page("el('panels').data.length") == 3
    page.page.locator("#many label", has_text="heads").click()
    assert page("el('panels').data.length") == 4
    assert page.text("#of") == "The heads of layer 1"
    page.click("panels", 2, 2, axes=4)
    assert page.text("#head") == "Layer 1, head 3"

    page.page.focus("#overlay")
    page("ask(1 + 5)")  # the end of the first row
    for key, query in (
        ("ArrowRight", 6), ("ArrowUp", 6), ("ArrowLeft", 5), ("ArrowDown", 11), ("Escape", None), ("ArrowRight", 1),
    ):  # fmt: skip
        page.page.keyboard.press(key)
        assert page("state.query") == query


@in_browser
def test_dark_and_pictures_in_place(found, visit) -> None:
    page = visit(found, color_scheme="dark")
    assert page("getComputedStyle(document.body).backgroundColor") == "rgb(15, 17, 22)"
    pictures = "[...el('{}').querySelectorAll('image')].filter(n => n.href.baseVal.startsWith('data:image/jpeg'))"
    assert page(pictures.format("overlay") + ".length") == 1
    assert page(pictures.format("panels") + ".length") == 3
    heat = "[...el('overlay').querySelectorAll('.heatmaplayer image')]"
    where = ".map(node => (b => [b.x, b.y, b.width, b.height])(node.getBoundingClientRect()))[0]"
    picture, heat = page(pictures.format("overlay") + where), page(heat + where)
    assert picture[2] > 300
    assert picture == pytest.approx(heat, abs=1.5)
