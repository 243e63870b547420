"""DuoFormer: backbones of several kinds, its tokens, the published names, what is frozen and what refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.models.vision.duoformer import DuoFormer
from tests.mechanisms.test_multi_scale import published

TINY = {"dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "grid": (2, 1), "num_classes": 3}


def pyramid(images: Tensor) -> list[Tensor]:
    """Means of the pixels at five strides."""
    return [F.avg_pool2d(images, 2**i) for i in range(1, 6)]


def model(**changes) -> DuoFormer:
    torch.manual_seed(0)
    return DuoFormer(**{"backbone": pyramid, "channels": (2,) * 5, **TINY, **changes}).eval()


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_tokens_are_projected_pixels_of_the_last_stages(scales: int) -> None:
    net, images = model(scales=scales), torch.randn(2, 2, 64, 32)
    got = net.tokens(images)
    maps = pyramid(images)[-scales:]
    for p in range(2):
        want = [net.scale_token[0, 0, 0].expand(2, -1)]
        for i in range(scales):  # the coarsest first
            f, project = 2**i, net.projections[scales - 1 - i]
            places = [(r, c) for r in range(f) for c in range(f)] if f != 2 else [(0, 0), (1, 0), (0, 1), (1, 1)]
            want += [project(maps[scales - 1 - i][:, :, f * p + r, c]) for r, c in places]
        torch.testing.assert_close(got[:, p], torch.stack(want, 1))
    torch.testing.assert_close(net(images), net.head(got))


def test_the_channel_token_sees_all_stages() -> None:
    net, images = model(scales=2, scale_token="channel"), torch.randn(2, 2, 64, 32)
    token = net.channel_token
    x0, x1, x2, x3 = pyramid(images)[-4:]
    for conv in token.shrink[0]:
        x0 = F.conv2d(x0, conv.weight, conv.bias, 2, 1)
    x1 = F.conv2d(x1, token.shrink[1][0].weight, token.shrink[1][0].bias, 2, 1)
    x = torch.cat([F.max_pool2d(x0, 2), F.max_pool2d(x1, 2), F.max_pool2d(x2, 2), x3], 1)
    for conv, bn, _ in zip(*[iter(token.mix)] * 3, strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, 1, 1)
        x = (x / (1 + bn.eps) ** 0.5).relu()
    torch.testing.assert_close(net.tokens(images)[:, :, 0], x.flatten(2).mT, atol=1e-5, rtol=1e-4)
    assert [len(shrink) for shrink in token.shrink] == [2, 1, 0, 0]


class Described(nn.Module):
    """Feature maps as timm's models give them."""

    class feature_info:
        @staticmethod
        def channels() -> list[int]:
            return [2] * 5

    def forward(self, images: Tensor) -> list[Tensor]:
        return pyramid(images)


def test_backbones_of_all_kinds() -> None:
    images = torch.randn(2, 2, 64, 32)
    described = DuoFormer(Described(), **TINY).eval()
    described.load_state_dict(model().state_dict())
    torch.testing.assert_close(described(images), model()(images))
    own = {"in_chans": 2, "dims": (4, 8, 8, 12), "depths": (1,) * 4, "num_heads": (1,) * 4, "features_only": True}
    net = DuoFormer(regard.create("mala/model", **own), **TINY).eval()
    assert net.channels == (4, 8, 8, 12)
    assert net(images).shape == (2, 3)
    net = DuoFormer("resnet18", in_chans=2, **TINY).eval()
    features = net.backbone(images)
    assert [tuple(x.shape[1:]) for x in features] == [(64, 16, 8), (128, 8, 4), (256, 4, 2), (512, 2, 1)]
    assert net(images).shape == (2, 3)


def test_a_frozen_backbone_learns_nothing() -> None:
    images = torch.randn(2, 3, 64, 32)
    for frozen in (True, False):
        net = DuoFormer("resnet18", **TINY, freeze_backbone=frozen).train()
        before = {name: t.clone() for name, t in net.backbone.state_dict().items()}
        optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
        net(images).square().sum().backward()
        optimizer.step()
        changed = [name for name, t in net.backbone.state_dict().items() if not torch.equal(t, before[name])]
        assert (changed == []) == frozen
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        assert net.projections[0].weight.grad.count_nonzero() > 0


def test_it_compiles_and_exports() -> None:
    net, images = model(scale_token="channel", scales=2), torch.randn(1, 2, 64, 32)
    want = net(images)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), want, atol=1e-5, rtol=1e-4)
    exported = torch.export.export(net, (images,))
    torch.testing.assert_close(exported.module()(images), want, atol=1e-5, rtol=1e-4)


def test_it_is_saved_and_loaded(tmp_path) -> None:
    net, images = DuoFormer("resnet18", **TINY).eval(), torch.randn(1, 3, 64, 32)
    net.save_pretrained(tmp_path)
    assert torch.equal(DuoFormer.from_pretrained(tmp_path).eval()(images), net(images))
    halved = net.bfloat16()(images.bfloat16())
    assert halved.dtype == torch.bfloat16


@pytest.mark.parametrize("scale_token", ["random", "channel"])
def test_published_names(scale_token) -> None:
    net = DuoFormer("resnet18", **{**TINY, "grid": (2, 2)}, scales=4, scale_token=scale_token).eval()
    with torch.no_grad():
        for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 1.5)
    state = {f"vision_transformer.{name}": tensor for name, tensor in published(net.head).items()}
    for i, projection in enumerate(net.projections):
        state[f"projection.proj_heads{i}.weight"] = projection.weight[:, :, None, None]
        state[f"projection.proj_heads{i}.bias"] = projection.bias
    children = {"0": net.backbone.stem[0].conv, "1": net.backbone.stem[0].bn}
    for i, stage in enumerate(net.backbone.stages):
        for j, block in enumerate(stage):
            name = f"{i + 4}.{j}"
            children |= {f"{name}.conv1": block.conv1.conv, f"{name}.bn1": block.conv1.bn}
            children |= {f"{name}.conv2": block.conv2.conv, f"{name}.bn2": block.conv2.bn}
            if not isinstance(block.shortcut, nn.Identity):
                children |= {f"{name}.downsample.0": block.shortcut.conv, f"{name}.downsample.1": block.shortcut.bn}
    children = {f"resnet_projector.{name}": module for name, module in children.items()}
    if scale_token == "random":
        state["channel_token"] = net.scale_token
    else:
        shrink, mix = net.channel_token.shrink, net.channel_token.mix
        children |= {"chann_proj1.conv1": shrink[0][0], "chann_proj1.conv2": shrink[0][1]}
        children |= {"chann_proj2.conv1": shrink[1][0]}
        for i in range(4):
            children |= {
                f"chann_proj_all.nConvs.{i}.conv": mix[3 * i],
                f"chann_proj_all.nConvs.{i}.norm": mix[3 * i + 1],
            }
    for name, module in children.items():
        state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    kwargs = {"depth": 1, "embed_dim": 8, "proj_dim": 8, "num_heads": 2, "num_classes": 3, "num_patches": 4}
    kwargs |= {"mlp_ratio": 2.0, "backbone": "r18", "scale_token": scale_token, "init_values": 1e-5}
    loaded = regard.from_official("duoformer", state, variant="model", **kwargs).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), net(images))
    assert not loaded.backbone.stem[0].conv.weight.requires_grad
    with pytest.raises(Unsupported, match="r50_Swav"):
        regard.from_official("duoformer", state, variant="model", **{**kwargs, "backbone": "r50_Swav"})


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="images: expected feature maps"):
        model()(torch.randn(1, 2, 64, 64))
    with pytest.raises(ShapeError, match="images"):
        model()(torch.randn(2, 64, 64))
    with pytest.raises(ShapeError, match="backbone: expected a list of 4"):
        model(backbone=lambda images: images)(torch.randn(1, 2, 64, 32))
    with pytest.raises(ArgumentError, match="channels: a Linear does not say"):
        DuoFormer(nn.Linear(2, 2), **TINY)
    with pytest.raises(ArgumentError, match="channels: expected those of 4"):
        model(channels=(2, 2))
    with pytest.raises(ArgumentError, match="backbone: expected a module or one of"):
        model(backbone="vgg")
    for name, value in {"scales": 5, "scale_token": "mean", "grid": (0, 2)}.items():
        with pytest.raises(ArgumentError, match=name):
            model(**{name: value})
