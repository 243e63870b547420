"""`regard inspect` from the command line."""

import pytest
import torch
import transformers
from PIL import Image

from regard.cli.main import main
from regard.tasks import english
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer


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
            main(("inspect", *map(str, arguments)))
        return exit_.value.code, *capsys.readouterr()

    return run


def test_own_model_and_text(run, folder, tmp_path) -> None:
    text, report = tmp_path / "letter.txt", tmp_path / "page.html"
    text.write_text(english()[:3000], encoding="utf-8")
    code, out, err = run("--model", folder, "--text", text, "--tokens", 50, "--report", report)
    assert code == 0
    assert out == f"the text goes on after its first 50 tokens; --tokens reads more\nreport: {report}\n"
    assert "layer 3 of 3" in err
    assert "letter.txt, which goes on after them" in report.read_text(encoding="utf-8")


def test_a_short_text_is_read_whole(run, folder, tmp_path) -> None:
    text, report = tmp_path / "letter.txt", tmp_path / "page.html"
    text.write_text("Dear reader, good day.", encoding="utf-8")
    code, out, _ = run("--model", folder, "--text", text, "--report", report)
    assert (code, out) == (0, f"report: {report}\n")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a vision transformer, and a picture."""
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=48, patch_size=8)).save_pretrained(path)
    Image.linear_gradient("L").save(path / "picture.png")
    return str(path), str(path / "picture.png")


def test_own_vision_model_and_picture(run, vit, tmp_path) -> None:
    report = tmp_path / "page.html"
    code, out, err = run("--model", vit[0], "--image", vit[1], "--report", report)
    assert (code, out) == (0, f"report: {report}\n")
    assert "layer 3 of 3" in err
    assert f"6 × 6 patches of {vit[1]}" in report.read_text(encoding="utf-8")


def test_the_bundled_vision_model_brings_a_picture(run, vit_s, monkeypatch, tmp_path) -> None:
    from regard.study import models

    monkeypatch.setattr(models, "load_vision", lambda *_, **__: vit_s)
    report = tmp_path / "page.html"
    code, out, _ = run("--model", "vit-s", "--report", report)
    assert (code, out) == (0, f"report: {report}\n")
    assert "16 × 16 patches of a photograph of an astronaut" in report.read_text(encoding="utf-8")


def test_a_picture_alone_is_for_the_bundled_vision_model(run, vit, vit_s, monkeypatch, tmp_path) -> None:
    from regard.study import models

    asked = []
    monkeypatch.setattr(models, "load_vision", lambda model, **_: asked.append(model) or vit_s)
    assert run("--image", vit[1], "--report", tmp_path / "page.html")[0] == 0
    assert asked == ["vit-s"]


def test_text_or_picture(run, vit, tmp_path) -> None:
    report = tmp_path / "r.html"
    for arguments, message in (
        (("--text", "a.txt", "--image", vit[1]), "--text and --image: expected one of them, got both"),
        (("--text", "a.txt", "--model", "vit-s"), "--text: vit-s looks at pictures; give one with --image"),
        (("--model", vit[0], "--image", "nowhere.png"), "image: cannot read 'nowhere.png': No such file or directory"),
    ):
        code, out, err = run(*arguments, "--report", report)
        assert (code, out) == (2, "")
        assert message in err
        assert not report.exists()


def test_help_teaches_by_example(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert out.count("regard inspect --") >= 3
    for option in ("--model", "--text", "--image", "--tokens", "--report", "--device"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no/such-model"), "model: cannot load 'no/such-model'"),
        (("--text", "nowhere.txt"), "text: cannot read 'nowhere.txt': No such file or directory"),
        (("--tokens", "1"), "tokens must be 2 to 4096, got 1"),
        (("--tokens", "600"), "tokens: the model reads at most 512, got 600"),
        (("--report", "no/such/folder/r.html"), "cannot write 'no/such/folder/r.html': there is no folder"),
    ],
)
def test_errors_are_one_line(run, folder, tmp_path, arguments, message) -> None:
    given = {"--model": folder, "--report": str(tmp_path / "r.html"), **{arguments[0]: arguments[1]}}
    code, out, err = run(*(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_a_report_must_be_named(run, folder) -> None:
    code, _, err = run("--model", folder)
    assert code == 2
    assert "--report" in err
