"""The inspector's figures against eager attention, and its page: small, safe, the same every time, and alive."""

import json
import math
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regard.errors import ArgumentError
from regard.study.inspect import ROLES, Inspection, Unit, _role, inspect
from regard.tasks import english
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

NASTY = "</script><script>document.title = 'broken'</script>&amp;<img src=x onerror=alert(1)>\u2028"
TEXT = english()[10_000:11_000]
N = 90


def model(name="llama", **changes):
    return tiny(name, vocab_size=VOCAB_SIZE, attn_implementation="eager", **changes)


@pytest.fixture(scope="module")
def found():
    return inspect((model(), tiny_tokenizer()), text=TEXT, tokens=N)


@pytest.fixture(scope="module")
def weights():
    """(layers, heads + 1, N, N), the last being the mean."""
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][:N]])
    with torch.no_grad():
        every = torch.cat(model()(ids, output_attentions=True).attentions)
    return torch.cat([every, every.mean(1, keepdim=True)], 1), ids[0].tolist()


def page(inspection, path):
    inspection.report(path)
    return path.read_text(encoding="utf-8")


def data(source):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
    return json.loads(text)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def binned(w, edges):
    parts = [w[:, a:b].mean(1) for a, b in pairwise(edges)]
    rows = torch.stack(parts, 1)
    return torch.stack([rows[..., a:b].sum(-1) for a, b in pairwise(edges)], -1)


def test_tensors_equal_eager_attention(found, weights) -> None:
    w, _ = weights
    close(found.patterns, binned(w.flatten(0, 1), found.edges))
    close(found.flow, binned(w.flatten(0, 1), found.spans))
    close(found.received, (w.sum(2) / torch.arange(N, 0, -1)).flatten(0, 1))
    top = w[:, -1].topk(found.top.shape[-1]).values
    close(found.shares, top)
    close(w[:, -1].gather(-1, found.top), top)


def test_figures_equal_eager_attention(found, weights) -> None:
    w, ids = weights
    assert [(unit.layer, unit.head) for unit in found.units] == [(i, h) for i in range(3) for h in (0, 1, 2, 3, None)]
    for unit, one in zip(found.units, w.flatten(0, 1), strict=True):
        assert unit.first == pytest.approx(float(one[:, 0].mean()), abs=1e-4)
        if unit.head is not None:
            assert unit.entropy == pytest.approx(float(torch.special.entr(one).sum(-1).mean()), abs=1e-4)
        again = {i: [j for j in range(1, i) if ids[j - 1] == ids[i]] for i in range(N)}
        expected = [float(one[i, keys].sum()) for i, keys in again.items() if keys]
        assert len(expected) > 5
        assert unit.repetition == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert (unit.role is None) == (unit.head is None)


def test_heads_are_read_in_groups(found, monkeypatch) -> None:
    monkeypatch.setattr("regard.study.inspect._CHUNK_BYTES", 4 * N * N * 3)
    again = inspect((model(), tiny_tokenizer()), text=TEXT, tokens=N)
    for name in ("patterns", "flow", "received", "shares"):
        close(getattr(again, name), getattr(found, name))
    assert [u.role for u in again.units] == [u.role for u in found.units]


@pytest.mark.parametrize(
    ("shares", "role"),
    [
        ((0.6, 0.4, 1.0, 0, 0, 0), "itself"),
        ((0.1, 0.5, 0.7, 0, 0.4, 0), "previous token"),
        ((0, 0, 0, 0.7, 0.3, 0), "repetition"),
        ((0, 0, 0, 0.7, 0.2, 0.9), "first token"),
        ((0.2, 0.3, 0.7, 0, 0, 0.9), "nearby"),
        ((0, 0, 0, 0, 0, 0.8), "broad"),
        ((0, 0, 0, 0, 0, 0.2), "mixed"),
    ],
)
def test_roles(shares, role) -> None:
    assert _role(*shares) == role
    assert role in ROLES


def test_tokens_read_as_the_text_and_spans_end_with_sentences(found) -> None:
    assert TEXT.startswith("".join(found.tokens))
    assert found.cut
    assert (found.spans[0], found.spans[-1]) == (0, N)
    inner = [found.tokens[edge - 1].rstrip()[-1:] for edge in found.spans[1:-1]]
    assert "." in inner
    whole = inspect((model(), tiny_tokenizer(bos=True)), text="A café. \U0001f600 Good?\n", tokens=60)
    assert not whole.cut
    assert whole.tokens[:2] == ["<s>", "A"]
    assert (
        len(whole.tokens)
        == whole.recording.length
        == len(tiny_tokenizer(bos=True)("A café. \U0001f600 Good?\n").input_ids)
    )


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "phi3"])
def test_other_families_and_two_tokens(name) -> None:
    assert len(inspect((model(name), tiny_tokenizer()), text=TEXT, tokens=40).units) == 15
    assert inspect((model(name), tiny_tokenizer()), text=TEXT, tokens=2).patterns.shape == (15, 2, 2)


def test_the_page_holds_the_data_and_is_the_same_every_time(found, tmp_path) -> None:
    source = page(found, tmp_path / "a.html")
    assert source == page(inspect((model(), tiny_tokenizer()), text=TEXT, tokens=N), tmp_path / "b.html")
    read = data(source)
    assert read["tokens"] == found.tokens
    assert read["units"][1]["entropy"] == found.units[1].entropy
    assert f"{N} tokens" in source
    assert "12 heads" in source


def test_the_page_loads_nothing(found, tmp_path) -> None:
    source = page(found, tmp_path / "a.html")
    assert "default-src 'none'" in source
    for word in ("http:", "https:", "url(", "@import", " src=", " href=", "<link"):
        assert word not in source


def test_what_comes_from_model_and_text_is_escaped(tmp_path) -> None:
    network = model()
    network.config.name_or_path = NASTY
    source = page(inspect((network, tiny_tokenizer()), text=NASTY * 2, tokens=400), tmp_path / "a.html")
    assert "<script>document" not in source
    assert "<img" not in source
    assert source.count("</script>") == 2
    assert "".join(data(source)["tokens"]).startswith(NASTY[:40])


def test_a_page_of_two_thousand_tokens_is_small(tmp_path) -> None:
    layers, heads, n = 30, 9, 2048
    units = [Unit(i, h, 1.0, 2.0, 0.5, 0.1, "mixed") for i in range(layers) for h in range(heads)]
    units += [Unit(i, None, 1.0, 2.0, 0.5, 0.1, None) for i in range(layers)]
    shares = torch.rand(len(units), 48, 48)
    big = Inspection(
        "m", "t", ["tokens "] * n, True, units, tuple(n * i // 48 for i in range(49)), shares, tuple(range(0, 13)),
        torch.rand(len(units), 12, 12), torch.rand(len(units), n), torch.randint(n, (layers, n, 16)),
        torch.rand(layers, n, 16), SimpleNamespace(layers=dict.fromkeys(range(layers))),
    )  # fmt: skip
    assert len(page(big, tmp_path / "a.html")) < 15e6


def test_levels_keep_shares_to_four_percent(found, tmp_path) -> None:
    from base64 import b64decode

    levels = torch.frombuffer(
        bytearray(b64decode(data(page(found, tmp_path / "a.html"))["patterns"])), dtype=torch.uint8
    )
    for level, share in zip(levels.tolist(), found.patterns.flatten().tolist(), strict=True):
        if share < 1e-4:
            assert level <= 1
        else:
            assert math.isclose(10 ** (-4 * (1 - (level - 1) / 254)), share, rel_tol=0.04)


def test_progress_and_refusals() -> None:
    seen = []
    inspect((model(), tiny_tokenizer()), text=TEXT, tokens=9, on_progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    pair = (model(), tiny_tokenizer())
    with pytest.raises(ArgumentError, match="tokens must be 2 to 4096, got 1"):
        inspect(pair, tokens=1)
    with pytest.raises(ArgumentError, match="the model reads at most 512, got 513"):
        inspect(pair, tokens=513)
    with pytest.raises(ArgumentError, match="expected at least 2 tokens, got 1"):
        inspect(pair, text="a")
    with pytest.raises(ArgumentError, match="text is empty"):
        inspect(pair, text=" ")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

#: what a reader does, appended to the page; what came of it is left in the title
CLICKS = """<script>{
const log = [], ok = (name, holds) => { if (!holds) log.push(name); };
window.addEventListener("error", event => log.push(event.message));
const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const cells = [...document.querySelectorAll(".cell")], words = [...document.querySelectorAll("#text span")];
const pixels = () => document.getElementById("pattern").toDataURL(), first = pixels();
ok("cells", cells.length === 15);
ok("words", words.length === data.tokens.length);
cells[6].click();
ok("head", document.getElementById("head").textContent === "Layer 1, head 1" && pixels() !== first);
ok("flow", document.querySelectorAll("#flow td").length === S * S);
cells[6].focus(); press(cells[6], "ArrowDown");
ok("arrows", document.activeElement === cells[11]);
document.querySelector("#metric input[value=entropy]").click();
ok("metric", cells[0].title.endsWith("nats"));
words[30].click();
ok("token", document.getElementById("layers").rows.length === 3 && words[30].classList.contains("query"));
ok("not before", words.slice(31).every(word => !word.style.background));
document.querySelectorAll("#layers button")[2].click();
ok("layer", document.getElementById("head").textContent === "Layer 2, mean of its heads");
press(words[30], "ArrowRight"); press(words[31], "Enter");
ok("keys", words[31].classList.contains("query") && !words[30].classList.contains("query"));
press(words[31], "Escape");
ok("escape", document.getElementById("layers").rows.length === 0);
document.title = "done " + log.join(", ");
}</script>"""

if CHROMIUM:  # not every machine has a browser; the page is tried wherever there is one

    def test_clicks_and_keys_in_a_browser(found, tmp_path) -> None:
        source = page(found, tmp_path / "a.html")
        (tmp_path / "a.html").write_text(source.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
        ran = subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", Path(tmp_path / "a.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in ran.stderr
        assert re.findall("<title>(.*?)</title>", ran.stdout) == ["done "]
