"""The command line: what `list` and `info` print, one-line errors, and a start without torch."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import regard
from regard import catalog
from regard.catalog import System
from regard.cli.main import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run one command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("REGARD_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> System:
    """The entry of power-attention as it is once it works."""
    system = replace(
        catalog.get("power-attention"), status="works", object="regard.methods.language.power_attention:PowerAttention"
    )
    rest = [s for s in catalog.systems() if s.slug != system.slug]
    monkeypatch.setattr(catalog.loader, "_read", lambda: {s.slug: s for s in [system, *rest]})
    return system


def test_list_shows_every_system_on_a_line_of_its_own(run) -> None:
    code, out, _ = run("list")
    assert code == 0
    listed = re.findall(r"^ *(\S+) +(?:works|planned) ", out, re.MULTILINE)
    assert tuple(listed) == catalog.names()


def test_list_counts_honestly(run, works: System) -> None:
    counts = (len(catalog.names(status=status)) for status in ("works", "planned"))
    assert run("list")[1].splitlines()[-1] == "{} work, {} planned".format(*counts)
    out = run("list", "--status", "works", "--kind", "mask")[1]
    assert works.slug in out
    assert re.search(r"^\d+ work, 0 planned, of 155 in the catalogue$", out, re.MULTILINE)


def test_list_filters_and_prints_json(run) -> None:
    code, out, _ = run("list", "--kind", "cache", "--family", "language", "--json")
    records = json.loads(out)
    assert code == 0
    assert [r["slug"] for r in records] == list(catalog.names(kind="cache", family="language"))
    assert next(r for r in records if r["slug"] == "h2o")["arxiv"] == "2306.14048"


def test_list_that_matches_nothing_says_so(run) -> None:
    code, out, _ = run("list", "--kind", "parallel", "--family", "vision")
    assert code == 0
    assert out.strip() == "0 work, 0 planned, of 155 in the catalogue"


def test_list_fits_100_columns(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.cli.list._WIDTH_WITHOUT_TERMINAL", 100)
    out = run("list")[1]
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100
    for system in catalog.systems():
        assert re.search(rf"^ *{system.slug} +{system.status} +{re.escape(system.paper)} ", out, re.MULTILINE)


@pytest.mark.parametrize("slug", ["h2o", "diffusion-attention-control", "multilingual-llm-survey"])
def test_info_of_a_planned_system(run, monkeypatch: pytest.MonkeyPatch, slug: str) -> None:
    planned = replace(catalog.get(slug), status="planned", object=None)
    monkeypatch.setattr(catalog.loader, "_read", lambda: {slug: planned})
    code, out, _ = run("info", slug)
    text = " ".join(out.replace("│", " ").split())
    assert code == 0
    for expected in (planned.summary, planned.title, planned.paper, planned.official or "none published"):
        assert expected in text
    assert "nothing in this version of regard implements it yet" in text


def test_info_of_a_working_system_shows_how_to_use_it(run, works: System) -> None:
    code, out, _ = run("info", works.slug)
    text = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "from regard.methods.language.power_attention import PowerAttention" in text
    assert "block_size=32 tokens per block" in text
    assert "layers=None indices of the sites to act on, which are the layers where each has one; all by" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "h20"), "unknown system 'h20'; did you mean h2o?"),
        (("list", "--kind", "cach"), "unknown kind 'cach'; did you mean cache?"),
        (("list", "--status", "done"), "unknown status 'done'; expected one of works, planned"),
        (("info",), "Missing argument 'slug'. (see regard info --help)"),
        (("list", "--colour"), "No such option: --colour (see regard list --help)"),
        (("lst",), "No such command 'lst'. Did you mean 'list'? (see regard --help)"),
    ],
)
def test_bad_input_gets_one_line(run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "book.txt"), "book.txt: No such file or directory"),
        (OSError("no model 'x'\nin   the cache"), "no model 'x' in the cache"),
        (regard.errors.MissingExtra("plotly is needed"), "plotly is needed"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_expected_errors_become_one_line(run, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fail(slug: str) -> None:
        raise error

    monkeypatch.setattr(catalog, "get", fail)
    code, _, err = run("info", "h2o")
    assert code == 2
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_bugs_and_debug_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(slug: str) -> None:
        raise KeyError("a bug")

    monkeypatch.delenv("REGARD_DEBUG", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "get", fail)
        with pytest.raises(KeyError, match="a bug"):
            main(("info", "h2o"))
    monkeypatch.setenv("REGARD_DEBUG", "1")
    with pytest.raises(regard.errors.ArgumentError, match="unknown system"):
        main(("info", "h20"))


def test_debug_option_sets_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGARD_DEBUG", "")  # so that what the option sets is undone
    with pytest.raises(regard.errors.ArgumentError):
        main(("--debug", "info", "h20"))


def test_interrupt_exits_with_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(slug: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "get", interrupt)
    assert run("info", "h2o")[0] == 130


def test_version_and_bare_command(run) -> None:
    assert run("--version") == (0, f"regard {regard.__version__}\n", "")
    code, out, _ = run()
    assert code == 0
    assert "regard compare --model smollm2" in out


@pytest.mark.parametrize("command", ["compare", "list", "info"])
def test_help_shows_examples(run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert re.search(rf"Examples\s+regard {command} \S", out)


@pytest.mark.parametrize(
    "arguments", [["list"], ["info", "multilingual-llm-survey"], ["--help"], ["compare", "--help"]]
)
def test_starts_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from regard.cli.main import _run; code = _run(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
