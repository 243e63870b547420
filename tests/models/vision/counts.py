"""Sizes of backbones, without their memory."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import regard


def millions(name: str, **config: object) -> float:
    """Parameters of a model, in millions."""
    with torch.device("meta"):
        model = regard.create(name, **config)
    return sum(p.numel() for p in model.parameters()) / 1e6


def gigamacs(name: str, size: int = 224, **config: object) -> float:
    """Multiply-adds of one image, in billions: what vision papers call FLOPs."""
    with torch.device("meta"):
        model = regard.create(name, **config).eval()
        images = torch.empty(1, model.in_chans, size, size)
    assert isinstance(model, nn.Module)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2e9
