"""What saliency maps are made of in `study/findings/saliency`: a small network, and a probed vision transformer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from regard.tasks.images import TEXTURES, Patches
from regard.tasks.objects import Objects


def small_network() -> nn.Sequential:
    steps: list[nn.Module] = []
    for i, (before, after) in enumerate(((3, 16), (16, 32), (32, 48), (48, 48))):
        steps += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        steps += [nn.MaxPool2d(2)] if i < 2 else []
    return nn.Sequential(*steps, nn.MaxPool2d(8), nn.Flatten(), nn.Linear(48, Objects.num_classes))


def trained(task: Objects, steps: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = small_network()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for step in range(steps):
        batch = task.batch("train", step, 64, seed)
        loss = F.binary_cross_entropy_with_logits(model(2 * batch.images - 1), batch.labels.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model


def folded(model: nn.Sequential) -> nn.Sequential:
    """Without batch norms, which have no rule in LRP: each goes into the convolution before it."""
    steps: list[nn.Module] = []
    for layer in model.eval():
        if isinstance(layer, nn.BatchNorm2d):
            steps[-1] = fuse_conv_bn_eval(steps[-1], layer)  # type: ignore[type-var]
        else:
            steps.append(layer)
    return nn.Sequential(*steps)


class Probed(nn.Module):
    """A linear layer on the mean of a transformer's patch tokens."""

    def __init__(self, network: Any, num_classes: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(network.config.hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).last_hidden_state[:, 1:].mean(1)


def halves(split: Any, count: int, side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures whose halves show two textures, which ones (B, 8), and left and right (B, 2)."""
    images, targets = Patches("texture", size=side).batch(split, 0, max(count, len(TEXTURES)), seed)
    n = len(targets)
    others = [next(j % n for j in range(i + 1, i + n) if targets[j % n] != targets[i]) for i in range(count)]
    pictures, classes = images[:count].clone(), torch.stack([targets[:count], targets[others]], 1)
    pictures[..., side // 2 :] = images[others][..., side // 2 :]
    labels = torch.zeros(count, len(TEXTURES), dtype=torch.bool).scatter_(1, classes, True)
    return pictures.expand(-1, 3, -1, -1).contiguous(), labels, classes


def fit(model: Probed, x: Tensor, labels: Tensor, seed: int) -> None:
    """The linear layer alone."""
    torch.manual_seed(seed)
    with torch.no_grad():
        features = torch.cat([model.features(part) for part in x.split(8)])
    nn.init.zeros_(model.head.weight)
    optimiser = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = F.binary_cross_entropy_with_logits(model.head(features), labels.float())
        found = found + 1e-4 * model.head.weight.square().sum()
        found.backward()
        return found

    optimiser.step(loss)
