"""`regard compare` from the command line."""

import json

import pytest

from regard.cli.main import main
from regard.tasks import english
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

SMALL = ("--context", "120", "--continuation", "12", "--generate", "8", "--passkeys", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=VOCAB_SIZE).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run one command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("REGARD_DEBUG", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(("compare", *map(str, arguments)))
        return exit_.value.code, *capsys.readouterr()

    return run


def test_own_model_own_text_own_methods(run, folder, tmp_path):
    text, records, page = tmp_path / "text.txt", tmp_path / "records.json", tmp_path / "page.html"
    text.write_text(english()[10_000:20_000], encoding="utf-8")
    code, out, err = run(
        "--model", folder, "--text", text, "--methods", "h2o(budget=0.5),sliding-window(window_size=30)", *SMALL,
        "--json", records, "--report", page,
    )  # fmt: skip
    assert code == 0
    read = json.loads(records.read_text(encoding="utf-8"))
    assert [result["method"] for result in read["results"]] == [
        "dense", "h2o(budget=0.5)", "sliding-window(window_size=30)",
    ]  # fmt: skip
    assert read["settings"]["text"] == str(text)
    for result in read["results"]:
        assert f"{result['perplexity']:,.2f}" in out
        assert 0 <= result["agreement"] <= 1
    assert max(map(len, out.splitlines()[:-2])) <= 100
    assert out.splitlines()[-2:] == [f"records: {records}", f"report: {page}"]
    assert "<svg" in page.read_text(encoding="utf-8")
    assert "dense: reading and continuing" in err
    assert "h2o: passkeys" in err


def test_all_default_methods_run(run, folder):
    code, out, _ = run("--model", folder, *SMALL)
    assert code == 0
    assert "does not run" not in out
    for name in ("dense", "sliding-window", "streaming-llm", "h2o", "xkv", "power-attention", "longheads", "dhsa"):
        assert f"\n {name} " in out


def test_help_teaches_by_example(run):
    code, out, _ = run("--help")
    assert code == 0
    assert out.count("regard compare --") >= 3
    for option in ("--model", "--methods", "--text", "--context", "--json", "--report", "--passkeys", "--device"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "h3o"), "unknown method 'h3o'; did you mean h2o"),
        (("--methods", "h2o(share=1)"), "h2o has no argument 'share'; it takes "),
        (("--methods", "h2o("), "cannot read methods 'h2o('"),
        (("--model", "no/such-model"), "model: cannot load 'no/such-model'"),
        (("--text", "nowhere.txt"), "text: cannot read 'nowhere.txt': No such file or directory"),
        (("--context", "600"), "but the model reads at most 512"),
        (("--context", "-5"), "context must be at least 1, got -5"),
        (("--context", "many"), "Invalid value for '--context'"),
        (("--dtype", "float8"), "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (("--device", "tpu9"), "device 'tpu9' cannot be used"),
        (("--report", "no/such/folder/r.html"), "cannot write 'no/such/folder/r.html': there is no folder"),
        (("--json", "."), "cannot write '.': it is a folder"),
    ],
)
def test_errors_are_one_line(run, folder, arguments, message):
    code, out, err = run(*SMALL, *(() if "--model" in arguments else ("--model", folder)), *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8 text"), (b"Short.", "expected at least 132")],
)
def test_unusable_texts(run, folder, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    code, _, err = run("--model", folder, "--text", path, *SMALL)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_extra_is_named_before_anything_runs(run, folder, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run("--model", folder, *SMALL, "--report", tmp_path / "r.html")
    assert code == 2
    assert err == "error: jinja2 is needed to write reports; install it with: pip install 'regard[report]'\n"
