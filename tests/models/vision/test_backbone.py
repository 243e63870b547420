"""What `Backbone` promises, for every backbone of the catalogue that has published configurations."""

import pytest
import torch

import regard
from regard import catalog
from regard.errors import ShapeError
from regard.models.vision.backbone import Backbone
from tests.models.vision.counts import gigamacs
from tests.models.vision.small import SMALL


def test_every_backbone_is_tested() -> None:
    found = set()
    for system in catalog.systems(status="works"):
        for part in (None, *system.parts):
            cls = system.load(part)
            if isinstance(cls, type) and issubclass(cls, Backbone):
                found.add(system.slug if part is None else f"{system.slug}/{part}")
    assert found == set(SMALL)


@pytest.fixture(params=SMALL)
def case(request):
    torch.manual_seed(0)
    config, size = SMALL[request.param]
    return request.param, config, size


def test_logits_features_and_pooled_features(case) -> None:
    name, config, size = case
    images = torch.randn(2, config["in_chans"], size, size)
    model = regard.create(name, **config, num_classes=5).eval()
    assert model(images).shape == (2, 5)
    features = regard.create(name, **config, features_only=True).eval()(images)
    assert len(features) == len(model.channels) == len(model.strides)
    for feature, channels, stride in zip(features, model.channels, model.strides, strict=True):
        assert feature.shape == (2, channels, size // stride, size // stride)
    pooled = regard.create(name, **config, num_classes=0).eval()
    assert pooled(images).shape == (2, model.num_features)


def test_training_reaches_every_parameter(case) -> None:
    name, config, size = case
    model = regard.create(name, **config, num_classes=3, drop_path_rate=0.0).train()
    model(torch.randn(3, config["in_chans"], size, size)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_bfloat16_channels_last_and_a_folder(case, tmp_path) -> None:
    name, config, size = case
    images = torch.randn(1, config["in_chans"], size, size)
    model = regard.create(name, **config, num_classes=3).eval()
    want = model(images)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), want, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(images), want, atol=0, rtol=0)
    got = model.bfloat16()(images.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.1 * want.abs().max().item(), rtol=0)


def test_it_compiles_and_exports_in_one_graph(case) -> None:
    name, config, size = case
    images = torch.randn(1, config["in_chans"], size, size)
    model = regard.create(name, **config, num_classes=3).eval()
    want = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), want, atol=1e-5, rtol=1e-4)
    exported = torch.export.export(model, (images,))
    torch.testing.assert_close(exported.module()(images), want, atol=1e-5, rtol=1e-4)


def test_other_images_are_refused(case) -> None:
    name, config, size = case
    model = regard.create(name, **config)
    with pytest.raises(ShapeError, match="images"):
        model(torch.randn(1, config["in_chans"] + 1, size, size))


def test_macs_count_multiply_adds() -> None:
    assert gigamacs("mala-tiny") == pytest.approx(2.5, abs=0.3)
