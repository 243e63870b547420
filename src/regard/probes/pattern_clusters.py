"""The patterns that attention heads use: maps to codes by an autoencoder, codes to clusters (arXiv:2303.13731)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, require
from regard.probes.saliency import evaluating

_LIMIT = 96  # larger maps are pooled


class AttentionPatternAutoencoder(nn.Module):
    """Square maps to a few numbers and back, by convolutions; trained on the squared error.

    Three strided convolutions and a linear layer make the code; the decoder mirrors them. The codes are normalised
    (BatchNorm, as are the channels), or two numbers would hardly leave zero. A map is divided by its
    largest weight first, so that it lies in [0, 1] and an even map is 1 everywhere rather than noise. Maps of more than
    96 rows are averaged over squares until they have no more, and filled up with zeros to a multiple of eight.

    Args:
        size: N of the maps (N, N).
        code_dim: numbers in a code.
        width: channels of the first convolution.
        seed: of the weights and of the order of training.
    """

    def __init__(self, size: int, code_dim: int = 2, *, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        if min(size, code_dim, width) < 1:
            raise ArgumentError(f"size, code_dim and width must be at least 1, got {size}, {code_dim} and {width}")
        self.size, self.seed = size, seed
        self.pool = -(-size // _LIMIT)
        self.side = -8 * (-size // self.pool // 8)
        channels, small = [1, width, 2 * width, 4 * width], self.side // 8
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            down: list[nn.Module] = []
            up: list[nn.Module] = []
            for before, after in pairwise(channels):
                down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
                up = [nn.BatchNorm2d(after), nn.ReLU(), nn.ConvTranspose2d(after, before, 4, stride=2, padding=1), *up]
            flat = channels[-1] * small**2
            self.encoder = nn.Sequential(
                *down, nn.Flatten(), nn.Linear(flat, code_dim), nn.BatchNorm1d(code_dim, affine=False)
            )
            self.decoder = nn.Sequential(
                nn.Linear(code_dim, flat), nn.Unflatten(1, (channels[-1], small, small)), *up, nn.Sigmoid()
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, N, N) as they come back, (B, side, side) in [0, 1], to compare with `prepare`."""
        return self.decoder(self.encoder(self.prepare(maps)[:, None]))[:, 0]

    def prepare(self, maps: Tensor) -> Tensor:
        """(B, side, side) in [0, 1].

        Raises:
            ShapeError: maps of another shape.
        """
        if maps.dim() != 3 or maps.shape[1:] != (self.size, self.size):
            raise ShapeError(f"maps: expected (B, {self.size}, {self.size}), got {tuple(maps.shape)}")
        maps = maps.float()
        if self.pool > 1:
            maps = F.avg_pool2d(maps[:, None], self.pool, ceil_mode=True)[:, 0]
        maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
        return F.pad(maps, (0, self.side - maps.shape[-1]) * 2)

    def fit(
        self,
        maps: Tensor,
        *,
        epochs: int = 20,
        batch_size: int = 64,
        lr: float = 1e-2,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Train on maps (B, N, N) with Adam; the mean squared error of each epoch.

        Args:
            on_progress: called with epochs done and their number.
        """
        if epochs < 1 or batch_size < 2 or len(maps) < 2:
            raise ArgumentError(
                f"epochs must be at least 1, batch_size and maps 2, got {epochs}, {batch_size}, {len(maps)}"
            )
        targets = self.prepare(maps)
        generator = torch.Generator().manual_seed(self.seed)
        parts = max(1, len(maps) // batch_size)
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * parts)
        errors = []
        self.train()
        for epoch in range(epochs):
            if on_progress is not None:
                on_progress(epoch, epochs)
            total = 0.0
            for part in torch.randperm(len(maps), generator=generator).tensor_split(parts):
                with torch.enable_grad():
                    batch = targets[part, None]
                    loss = F.mse_loss(self.decoder(self.encoder(batch)), batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(part)
            errors.append(total / len(maps))
        self.eval()
        return errors

    @torch.no_grad()
    def encode(self, maps: Tensor, *, batch_size: int = 256) -> Tensor:
        """Codes (B, code_dim) of maps (B, N, N)."""
        with evaluating(self):
            return torch.cat([self.encoder(self.prepare(part)[:, None]) for part in maps.split(batch_size)])


@dataclass(frozen=True, eq=False)
class PatternSummary:
    """Clusters of codes, of `pattern_summary`.

    Attributes:
        labels: (B,) the cluster of each code; clusters are numbered by size, the largest first.
        centres: (k, code_dim).
        silhouettes: by number of clusters tried, the mean silhouette in [-1, 1].
        mean_maps: (k, N, N), where maps were given.
        histogram: (heads, k), the share of each head's maps in each cluster, where heads were given.
        entropy: (heads,) of the histogram, in nats: 0 for a head with one pattern whatever the picture.
    """

    labels: Tensor
    centres: Tensor
    silhouettes: dict[int, float]
    mean_maps: Tensor | None = None
    histogram: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centres)


def pattern_summary(
    codes: Tensor,
    k: int | None = None,
    *,
    maps: Tensor | None = None,
    heads: Tensor | None = None,
    max_k: int = 8,
    seed: int = 0,
) -> PatternSummary:
    """Group codes (B, D) by k-means, and describe the groups.

    Args:
        k: number of clusters; by default the one from 2 to `max_k` with the largest silhouette.
        maps: (B, N, N), what the codes are of, for the clusters' means.
        heads: (B,), the number from 0 of the head that each code comes from, for its histogram over clusters.
        seed: of k-means.

    Raises:
        ArgumentError: fewer codes than clusters and one.
        MissingExtra: scikit-learn is not installed.
        ShapeError: maps or heads that are not one per code.
    """
    if codes.dim() != 2:
        raise ShapeError(f"codes: expected (B, D), got {tuple(codes.shape)}")
    for name, given in (("maps", maps), ("heads", heads)):
        if given is not None and len(given) != len(codes):
            raise ShapeError(f"{name}: expected one for each of {len(codes)} codes, got {len(given)}")
    tried = [k] if k is not None else list(range(2, max_k + 1))
    if not tried or not 2 <= min(tried) <= max(tried) < len(codes):
        raise ArgumentError(f"k: expected 2 to {len(codes) - 1} clusters of {len(codes)} codes, got {tried}")
    cluster = require("sklearn.cluster", "group patterns")
    metrics = require("sklearn.metrics", "group patterns")
    points = codes.double().numpy(force=True)
    fits, silhouettes = {}, {}
    for count in tried:
        fits[count] = cluster.KMeans(count, n_init=10, random_state=seed).fit(points)
        silhouettes[count] = float(
            metrics.silhouette_score(points, fits[count].labels_, sample_size=min(len(points), 2000), random_state=seed)
        )
    best = max(tried, key=lambda count: silhouettes[count])
    found = torch.from_numpy(fits[best].labels_).long()
    order = found.bincount(minlength=best).argsort(descending=True, stable=True)
    labels = order.argsort()[found]
    flags = F.one_hot(labels, best).double()
    histogram = None
    if heads is not None:
        counts = F.one_hot(heads.long().cpu()).double().T @ flags
        histogram = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return PatternSummary(
        labels,
        torch.from_numpy(fits[best].cluster_centers_)[order],
        silhouettes,
        None if maps is None else torch.stack([maps[(labels == c).to(maps.device)].mean(0) for c in range(best)]),
        histogram,
        None if histogram is None else torch.special.entr(histogram).sum(1),
    )
