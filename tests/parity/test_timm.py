"""Backbones against timm's models of the same name, with every weight drawn at random."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import ArgumentError, Unsupported
from regard.models.vision.timm import load_timm
from tests.timm_shim import timm

OTHER_NAMES = {"davit_tiny": "davit-tiny", "gcvit_xxtiny": "gc-vit-xxtiny", "shvit_s1": "shvit-s1"}


def _randomised(model: nn.Module) -> nn.Module:
    """Nothing may hide behind weights of 0 and 1, so norms, biases and running statistics are random too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else parameter + 0.1 * noise
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def _same(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        expected, found = theirs(images), ours.eval()(images)
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_of_timms_names(name) -> None:
    theirs = _randomised(timm.create_model(name, num_classes=11))
    ours = load_timm(regard.create(OTHER_NAMES[name], num_classes=11), theirs.state_dict())
    _same(ours, theirs, torch.randn(1, 3, 224, 224))


def test_maxvit() -> None:
    from timm.models.maxxvit import model_cfgs

    theirs = _randomised(timm.create_model("maxvit_tiny_tf_224", num_classes=11, depths=(1, 1, 1, 1)))
    config = {**asdict(model_cfgs["maxvit_tiny_tf"]), "depths": (1, 1, 1, 1)}
    ours = regard.from_official("maxvit", theirs.state_dict(), cfg=config, num_classes=11)
    with torch.device("meta"):
        assert _shapes(ours) == _shapes(regard.create("maxvit-tiny", num_classes=11, depths=(1, 1, 1, 1)))
    _same(ours, theirs, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize(("name", "size"), [("halonet26t", "halonet-26t"), ("halonet50ts", "halonet-50ts")])
def test_halonet(name: str, size: str) -> None:
    from timm.models.byoanet import model_cfgs

    theirs = _randomised(timm.create_model(name, num_classes=11))
    config = {**asdict(model_cfgs[name]), "blocks": _blocks(model_cfgs[name].blocks)}
    ours = regard.from_official("halonet", theirs.state_dict(), cfg=config, num_classes=11)
    with torch.device("meta"):
        assert _shapes(ours) == _shapes(regard.create(size, num_classes=11))
    _same(ours, theirs, torch.randn(1, 3, 256, 256))


def test_other_networks_and_leftover_weights_are_refused() -> None:
    with torch.device("meta"):
        maxvit = regard.create("maxvit-tiny")
    with pytest.raises(Unsupported, match="known for DaViT, GCViT, SHViT, got MaxViT"):
        load_timm(maxvit, {})
    model = regard.create("shvit-s1", num_classes=11)
    with pytest.raises(ArgumentError):
        load_timm(model, {**model.state_dict(), "more": torch.zeros(1)})


def _blocks(blocks: Any) -> Any:
    return [asdict(b) if not isinstance(b, list | tuple) else [asdict(one) for one in b] for b in blocks]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
