"""What every mixer of grids promises, at the arguments of its example."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from regard import catalog
from regard.errors import ArgumentError, ShapeError
from regard.study.pictures import mixers

Make = tuple[str, str]


def _all() -> Iterator[Make]:
    for system in catalog.systems(status="works"):
        for name, _ in mixers(system):
            yield system.slug, name


ALL = list(_all())
IDS = [f"{slug}, {name}" for slug, name in ALL]


def _layer(slug: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    return dict(mixers(catalog.get(slug)))[name]().eval()


@pytest.mark.parametrize(("slug", "name"), ALL, ids=IDS)
def test_images_of_a_batch_do_not_meet(slug, name) -> None:
    layer, x = _layer(slug, name), torch.randn(2, 14, 14, 64)
    y = layer(x)
    assert y.shape[:3] == x.shape[:3]
    torch.testing.assert_close(y[1:], layer(x[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("slug", "name"), ALL, ids=IDS)
def test_channels_first_memory_and_bfloat16(slug, name) -> None:
    layer, x = _layer(slug, name), torch.randn(1, 14, 14, 64)
    y = layer(x)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(strided), y, atol=1e-5, rtol=1e-5)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).norm() <= 0.03 * y.norm()


@pytest.mark.parametrize(("slug", "name"), ALL, ids=IDS)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 4), (15, 14)])
def test_odd_and_small_grids_work_or_are_refused(slug, name, size) -> None:
    x = torch.randn(1, *size, 64)
    layer = _layer(slug, name)
    try:
        y = layer(x)
    except (ShapeError, ArgumentError):  # such as a window that does not fit
        with pytest.raises((ShapeError, ArgumentError), match=r"^(x|kernel_size|grid_size|window_size)\b"):
            layer(x)
    else:
        assert y.shape[:3] == x.shape[:3]
        assert y.isfinite().all()


@pytest.mark.parametrize(("slug", "name"), ALL, ids=IDS)
def test_gradients_reach_every_parameter_and_the_input(slug, name) -> None:
    layer, x = _layer(slug, name).train(), torch.randn(2, 14, 14, 64, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    missing = [key for key, p in layer.named_parameters() if p.grad is None]
    assert not missing
