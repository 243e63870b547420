"""The inspector's page: small, safe, the same every time, drawn by plotly, and alive in a browser."""

import base64
import math
import re

import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs

from regard.study.inspect import Inspection, Unit, inspect
from regard.study.inspect_page import data, render
from regard.tasks import english
from tests.study.visit import Visit, embedded, in_browser
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

NASTY = "</script><script>document.title = 'broken'</script>&amp;<img src=x onerror=alert(1)> <b>bold</b> %{x}\u2028"
TEXT = english()[10_000:11_000]
N = 90


def model():
    return tiny("llama", vocab_size=VOCAB_SIZE)


def read(text=TEXT, tokens=N, network=None):
    return inspect((network or model(), tiny_tokenizer()), text=text, tokens=tokens)


@pytest.fixture(scope="module")
def found():
    return read()


@pytest.fixture(scope="module")
def nasty():
    network = model()
    network.config.name_or_path = NASTY
    return read(NASTY * 2, 400, network)


@pytest.fixture(scope="module")
def big():
    """As large as SmolLM2 and two thousand tokens make it."""
    layers, heads, n = 30, 9, 2048
    units = [
        Unit(i, h, 1.0, 2.0, 0.5, 0.1, None if h is None else "mixed")
        for i in range(layers)
        for h in (*range(heads), None)
    ]
    edges = tuple(n * i // 48 for i in range(49))
    return Inspection(
        model="m", source="t", tokens=["tokens "] * n, cut=True, causal=True, units=units, edges=edges,
        patterns=torch.rand(len(units), 48, 48), spans=tuple(n * i // 12 for i in range(13)),
        flow=torch.rand(len(units), 12, 12), received=torch.rand(len(units), n),
        top=torch.randint(n, (layers, n, 16)), shares=torch.rand(layers, n, 16),
    )  # fmt: skip


def decoded(text):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def figures(read):
    return {**read["overview"], **{name: read[name] for name in ("pattern", "flow", "looks")}}


def test_plotly_knows_every_property_of_the_figures(found, big) -> None:
    for inspection in (found, big):
        read = embedded(render(inspection))
        assert {"role", "entropy", "distance", "first token", "pattern", "flow", "looks"} <= set(figures(read))
        for theme in read["themes"].values():
            for figure in figures(read).values():
                go.Figure({"data": figure["data"], "layout": {**figure["layout"], "template": theme}})


def test_the_overview_shows_every_head_in_its_place(found) -> None:
    heads, means = data(found)["overview"]["entropy"]["data"]
    assert [[found.units[at].entropy for at in line] for line in heads["customdata"]] == heads["z"]
    assert [len(line) for line in heads["z"]] == [4, 4, 4]
    assert [(found.units[at].layer, found.units[at].head) for line in heads["customdata"] for at in line] == [
        (layer, head) for layer in range(3) for head in range(4)
    ]
    assert [found.units[at].layer for (at,) in means["customdata"]] == [0, 1, 2]
    assert all(found.units[at].head is None for (at,) in means["customdata"])
    far = data(found)["overview"]["distance"]
    assert far["data"][0]["z"][1][2] == pytest.approx(math.log1p(found.units[7].distance))
    assert far["layout"]["coloraxis"]["cmax"] == pytest.approx(math.log1p(max(u.distance for u in found.units)))


def test_the_page_is_the_same_every_time(found) -> None:
    source = render(found)
    assert source == render(read())
    assert embedded(source)["tokens"] == found.tokens
    assert f"{N} tokens" in source
    assert "12 heads" in source


def test_the_page_loads_nothing(found) -> None:
    source = render(found)
    assert "default-src 'none'" in source
    assert source.count(get_plotlyjs()) == 1
    own = source.replace(get_plotlyjs(), "")
    for word in ("http:", "https:", "url(", "@import", " src=", " href=", "<link"):
        assert word not in own


def test_what_comes_from_model_and_text_is_escaped(nasty) -> None:
    source = render(nasty)
    assert "<script>document" not in source
    assert "<img" not in source.replace(get_plotlyjs(), "")
    assert source.count("</script>") == 4
    assert "".join(embedded(source)["tokens"]).startswith(NASTY[:40])


def test_a_page_of_two_thousand_tokens_is_small(big) -> None:
    assert len(render(big).encode()) < 15e6


def test_levels_keep_shares_to_four_percent(found) -> None:
    levels = decoded(data(found)["patterns"])
    assert levels.shape == found.patterns.flatten().shape
    for level, share in zip(levels.tolist(), found.patterns.flatten().tolist(), strict=True):
        if share < 1e-4:
            assert level <= 1
        else:
            assert math.isclose(10 ** (-4 * (1 - (level - 1) / 254)), share, rel_tol=0.04)


@pytest.fixture(scope="module")
def opened(browser, found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    found.report(path)
    return Visit(browser, path, color_scheme="light")


@pytest.fixture
def page(opened):
    """The page of `found`, as if just opened."""
    opened("state.query = null, focusable(0), choose(page.start)")
    opened.page.check("#measure input[value=role]", force=True)
    yield opened
    opened.check()


@in_browser
def test_choosing_a_head(found, page) -> None:
    page.click("overview", 1, 1)
    assert page.text("#head") == "Layer 1, head 1"
    assert "nats" in page.text("#facts")
    shown, expected = page.z("pattern"), found.patterns[6]
    for q in range(expected.shape[0]):
        for k in range(expected.shape[1]):
            if expected[q, k] > 1e-4:
                assert 10 ** shown[q][k] == pytest.approx(float(expected[q, k]), rel=0.04)
            assert k <= q or shown[q][k] is None
    assert [[value is None for value in line] for line in page.z("flow")] == [
        [k > q for k in range(len(found.spans) - 1)] for q in range(len(found.spans) - 1)
    ]
    assert "layer 1, head 1" in page.text("#shown")
    page.click("overview", 4.3, 2)
    assert page.text("#head") == "Layer 2, mean of its heads"


@in_browser
def test_choosing_a_measure(found, page) -> None:
    roles = page.z("overview")
    page.page.locator("#measure label", has_text="entropy").click()
    assert page.z("overview")[1][2] == found.units[7].entropy
    assert page.z("overview") != roles
    assert not page.page.is_visible("#roles")
    page.page.locator("#measure label", has_text="role").click()
    assert page.z("overview") == roles
    assert page.page.is_visible("#roles")


@in_browser
def test_hovering_a_pattern_says_what_it_shows(found, page) -> None:
    page.click("pattern", 0.5, 60.5)
    bin_ = next(b for b, edge in enumerate(found.edges) if edge > 60.5) - 1
    said = page.text("#pattern .hoverlayer")
    assert f"{60}" in said
    assert "%" in said
    unit = page("state.unit")
    share = float(found.patterns[unit, bin_, 0])
    assert float(re.search(r"([\d.]+)%", said).group(1)) == pytest.approx(100 * share, rel=0.05, abs=0.6)


@in_browser
def test_choosing_a_token_and_a_layer(found, page) -> None:
    words = page.page.locator("#text span")
    assert words.count() == N
    assert not page.page.is_visible("#looks")
    page("choose(0)")
    words.nth(30).click()
    assert page.text("#token").startswith("Where token 30")
    assert page.text("#head") == "Layer 0, mean of its heads"
    z = page.z("looks")
    assert len(z) == 3
    columns = sorted({int(j) for j in found.top[:, 30].flatten() if j <= 30})
    largest = max(range(len(found.top[1, 30])), key=lambda k: float(found.shares[1, 30, k]))
    if len(columns) <= 24:
        place = columns.index(int(found.top[1, 30, largest]))
        assert 10 ** z[1][place] == pytest.approx(float(found.shares[1, 30, largest]), rel=0.04)
    coloured = page("words.map(word => word.style.background !== '')")
    assert any(coloured[:31])
    assert not any(coloured[31:])
    page.click("looks", 0, 2)
    assert page.text("#head") == "Layer 2, mean of its heads"
    assert page.text("#chips").startswith("Layer 2:")
    words.nth(30).click()
    assert page.text("#token") == "Choose a token"
    assert not page.page.is_visible("#looks")


@in_browser
def test_keys_alone_do(page) -> None:
    page("choose(6)")
    page.page.focus("#overview")
    for key, name in (
        ("ArrowDown", "Layer 2, head 1"), ("ArrowDown", "Layer 2, head 1"), ("ArrowLeft", "Layer 2, head 0"),
        ("ArrowLeft", "Layer 2, head 0"), ("End", "Layer 2, mean of its heads"),
        ("ArrowUp", "Layer 1, mean of its heads"), ("Home", "Layer 1, head 0"),
    ):  # fmt: skip
        page.page.keyboard.press(key)
        assert page.text("#head") == name
    page.page.focus("#text span[tabindex='0']")
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    assert page("state.query") == 1
    page.page.focus("#looks")
    page.page.keyboard.press("ArrowDown")
    assert page.text("#head") == "Layer 2, mean of its heads"
    page.page.focus("#text span[tabindex='0']")
    page.page.keyboard.press("Escape")
    assert page("state.query") is None


@in_browser
def test_light_and_dark(found, page, visit) -> None:
    look = """(() => [getComputedStyle(document.body).backgroundColor, el("overview")._fullLayout.font.color,
        el("pattern")._fullLayout.coloraxis.colorscale[0][1]])()"""
    light = page(look)
    assert light[0] == "rgb(247, 248, 251)"
    page.page.emulate_media(color_scheme="dark")
    page.until("el('pattern')._fullLayout.coloraxis.colorscale[0][1] === '#232633'")
    dark = page(look)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    page.page.emulate_media(color_scheme="light")
    assert visit(found, color_scheme="dark")(look) == dark


@in_browser
def test_hostile_text_stays_text(nasty, visit) -> None:
    page = visit(nasty)
    assert page("document.title").startswith("regard inspect: </script>")
    assert page("document.querySelectorAll('main img, main b, main script').length") == 0
    text = page.text("#text")
    assert text.startswith("</script><script>document.title")
    page.page.locator("#text span").nth(60).click()
    page.page.wait_for_selector("#looks .xtick text")
    ticks = page("[...el('looks').querySelectorAll('.xtick text')].map(node => node.textContent)")
    assert any("<" in tick for tick in ticks)
    labels = page("[...el('flow').querySelectorAll('.ytick text')].map(node => node.textContent)")
    assert "</script><script>" in labels[0].replace(" ", "")
    assert page("document.querySelectorAll('#flow tspan[style*=bold], #flow a').length") == 0


@in_browser
def test_two_thousand_tokens_come_alive(big, visit) -> None:
    page = visit(big)
    page.click("overview", 3, 4)
    assert page.text("#head") == "Layer 4, head 3"
    page("ask(2000)")
    assert len(page.z("looks")) == 30
