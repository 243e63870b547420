"""The page: complete, self-contained, and safe with whatever a model or file is called."""

import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from regard.study import words
from regard.study.machine import Machine
from regard.study.records import Clock, Comparison, Picture, Recall, Result, Settings

NASTY = "<script>alert('x')</script>&\"'"


def result(name, perplexity, **changes):
    values = {
        "method": f"{name}(size=7)" if name != "dense" else name,
        "parameters": {"size": 7, "name": NASTY},
        "loss": 1.5,
        "perplexity": perplexity,
        "perplexity_change": perplexity - 10,
        "recalls": [Recall(NASTY, 0.25, True), Recall("bus line", 0.75, False)],
        "agreement": 0.9,
        "cache_bytes": 90 * 2**20,
        "prefill_seconds": 4.0,
        "prefill_ratio": 1.1,
        "decode_seconds": 0.05,
        "decode_ratio": 0.9,
        "peak_bytes": 3 * 10**8,
        "pictures": [Picture(3, (0, 50, 100), [[1.0, 0, 0], [0.5, 0.5, 0]], [[0.2, 0.3, 0.5]] * 2, [NASTY, "b"], 60)],
    }
    return Result(name, **{**values, **changes})


def comparison(*results, **changes):
    settings = {
        "model": NASTY, "parameters": 134_515_008, "text": NASTY, "context": 2048, "continuation": 96, "generate": 64,
        "passkeys": 2, "seed": 0, "repeats": 1, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return Comparison(
        Settings(**{**settings, **changes}),
        Machine("Linux x86_64", NASTY, 2, 2, 2**34, {"python": "3.11.7", "regard": "0.1.0"}),
        [result("dense", 10.0), *results],
        Clock([4.0, 4.4], [0.05, 0.06]),
        300.0,
        "2026-01-02T03:04:05+00:00",
    )


FULL = comparison(result("h2o", 11.5), result("xkv", 950.0), Result("odd", "odd", error=f"cannot {NASTY}"))


class Page(HTMLParser):
    """Tags, attributes and text, and whether every element that was opened is closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    FULL.report(path)
    return Page(path.read_text(encoding="utf-8"))


def test_is_well_formed_and_small(page, tmp_path):
    assert page.open == []
    FULL.report(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 200_000


def test_loads_nothing_from_anywhere(page):
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert value.startswith("data:image/png;base64,")
    styles = "".join(value or "" for name, value in page.attributes if name == "style") + page.words
    assert "url(" not in styles
    assert "@import" not in styles
    assert "http" not in page.words


def test_names_are_shown_and_run_nothing(page):
    assert "script" not in page.tags
    assert page.words.count(NASTY) >= 5  # title, heading, model, text, machine, parameters, error


def test_holds_every_figure(page):
    assert page.tags.count("svg") == 2
    assert page.tags.count("img") == 2 * 3
    for figure in ("11.50", "+1.50", "950.00", "1/2", "90%", "90.0 MiB", "1.10×", "0.90×", "286.1 MiB", "odd"):
        assert figure in page.words


def test_a_comparison_of_nothing_but_dense_or_without_passkeys_renders(tmp_path):
    for case in (comparison(), comparison(result("h2o", 11.0, recalls=[], pictures=[]))):
        for one in case.results:
            one.recalls = []
        case.report(tmp_path / "r.html")
        assert "passkeys recalled" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def printed(case, width=100):
    console = Console(width=width, file=StringIO())
    console.print(case.table())
    return console.file.getvalue()


def test_table_fits_a_hundred_columns():
    long = result("power-attention", 1234.5, method="power-attention(block_size=32, window_blocks=5, sink_blocks=1)")
    out = printed(comparison(long, result("longheads", 2e7)))
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out
    lines = out.splitlines()
    (row,) = [line for line in lines if "power-attention" in line]
    assert re.split(r"\s{2,}", row.strip()) == [
        "power-attention", "1,234", "1/2", "90%", "90.0 MiB", "1.10×", "0.90×", "286.1 MiB",
    ]  # fmt: skip
    assert any("block_size=32" in line and "+1,224" in line and "●·" in line and "100%" in line for line in lines)


def test_table_says_what_does_not_run_and_that_dense_misses_some():
    out = " ".join(printed(FULL).split())
    assert "cannot <script>" in out
    assert "dense itself recalls 1 of 2 passkeys" in out
    assert "timed 2 times in between: prefill 4.00 s to 4.40 s, decode 50.0 ms to 60.0 ms" in out


def test_json_is_strict_and_complete(tmp_path):
    import json

    case = comparison(result("h2o", float("inf"), parameters={"predictor": object()}))
    case.to_json(tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert read["results"][1]["perplexity"] is None
    assert read["results"][0]["recalls"][0] == {"name": NASTY, "depth": 0.25, "correct": True}
    assert read["settings"]["context"] == 2048
    assert read["results"][1]["parameters"]["predictor"].startswith("<object object")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (3.14159, "3.14"), (999.9, "999.90"), (12345.6, "12,346"), (2.5e8, "2.5e+08"), (float("inf"), "inf")],
)
def test_numbers_in_words(value, shown):
    assert words.number(value) == shown


def test_sizes_times_and_changes_in_words():
    assert words.size(3 * 2**20) == "3.0 MiB"
    assert words.size(1536) == "1.5 KiB"
    assert words.seconds(0.0123) == "12.3 ms"
    assert words.seconds(12.344) == "12.34 s"
    assert words.change(-0.5) == "−0.50"
    assert words.change(0.0) == "+0.00"
    assert words.share(1, None) == "–"
