"""Methods by name against captum and by hand, their scores, and what the saliency study trains."""

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn
from torch.nn import functional as F

from regard.probes import gradcam
from regard.study import attribution, saliency_subjects
from regard.tasks.objects import Objects


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return saliency_subjects.folded(saliency_subjects.small_network())


def test_folding_changes_nothing() -> None:
    torch.manual_seed(0)
    network = saliency_subjects.small_network()
    x = torch.randn(4, 3, 32, 32)
    network(x)  # so that the batch norms have seen something
    want = network.eval()(x)
    torch.testing.assert_close(saliency_subjects.folded(network)(x), want, atol=1e-5, rtol=1e-4)


def test_gradcam_is_captums() -> None:
    network, x = model(), torch.randn(3, 3, 32, 32)
    target = torch.tensor([0, 4, 2])
    for layer in ("7", "9"):
        found = LayerGradCam(network, network[int(layer)]).attribute(x, target, relu_attributions=True)
        found = F.interpolate(found, (32, 32), mode="bilinear")[:, 0].detach()
        found = (found - found.amin((1, 2), keepdim=True)) / (found.amax((1, 2)) - found.amin((1, 2)))[:, None, None]
        found = found.nan_to_num(0.0)  # all zeros, where nothing speaks for the class
        assert found.any()
        torch.testing.assert_close(gradcam(network, x, target, [layer]), found, atol=1e-5, rtol=0)


def test_every_method_gives_a_map_of_the_picture_and_scores() -> None:
    network, x, target = model(), torch.randn(2, 3, 32, 32), torch.tensor([0, 4])
    boxes = torch.tensor([[0, 0, 32, 16], [0, 0, 0, 0]])
    methods = attribution.for_convolutions(["4", "7", "9"], window=8)
    maps = {name: make(network, x, target) for name, make in methods.items()}
    assert all(found.shape == (2, 32, 32) and found.isfinite().all() for found in maps.values())
    assert torch.equal(maps["random"], methods["random"](network, x, target))
    seen = []
    table = attribution.scores(network, x, target, maps, boxes, steps=2, perturbed=1, on_method=seen.append)
    assert seen == list(methods)
    assert all(set(row) == {"pointing", "insertion", "deletion"} for row in table.values())
    assert all(row["pointing"][0] <= 0.5 and row["insertion"][1] == 0 for row in table.values())


def test_mean_error_and_mass_by_hand() -> None:
    mean, error = attribution.mean_and_error(torch.tensor([1.0, 3.0]))
    assert (mean, error) == (2.0, pytest.approx(1.0))
    maps = torch.arange(1.0, 11).view(1, 2, 5)
    assert attribution.mass_inside(maps, torch.tensor([[1, 4, 2, 5]])).item() == pytest.approx(10 / 19)
    assert attribution.mass_inside(maps, torch.tensor([[0, 0, 2, 5]]), share=0.5).item() == pytest.approx(1.0)


def test_attention_rollout_of_a_tiny_transformer() -> None:
    """Products of (A + I) / 2, averaged over the patches' rows; the network keeps its own attention."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    network = Dinov2Model(config).eval()
    before, x = network.config._attn_implementation, torch.randn(2, 3, 28, 28)
    found = attribution.attention_rollout(network, x)
    assert network.config._attn_implementation == before
    assert found.shape == (2, 28, 28)
    network.set_attn_implementation("eager")
    first, second = network(pixel_values=x, output_attentions=True).attentions
    eye = torch.eye(5)
    product = torch.stack([(b.mean(0) + eye) / 2 @ (a.mean(0) + eye) / 2 for a, b in zip(first, second, strict=True)])
    want = product[:, 1:, 1:].mean(1).view(2, 1, 2, 2)
    torch.testing.assert_close(found, F.interpolate(want, (28, 28), mode="bilinear")[:, 0].detach())


def test_pictures_of_two_textures() -> None:
    pictures, labels, classes = saliency_subjects.halves("test", 12, 28, 0)
    assert pictures.shape == (12, 3, 28, 28)
    assert (classes[:, 0] != classes[:, 1]).all()
    assert torch.equal(labels.sum(1), torch.full((12,), 2))
    assert labels.gather(1, classes).all()


def test_training_learns() -> None:
    task = Objects(single=0.3)
    network = saliency_subjects.folded(saliency_subjects.trained(task, 25, 0))
    batch = task.batch("test", 0, 64)
    x, wanted = 2 * batch.images - 1, batch.labels.float()
    losses = [F.binary_cross_entropy_with_logits(net(x), wanted) for net in (network, model())]
    assert losses[0] < losses[1] - 0.05
