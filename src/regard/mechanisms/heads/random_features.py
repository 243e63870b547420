"""One attention layer of random, frozen query-key matrices, of which only the values are fitted: linear regression."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError

#: strengths of regularisation worth trying, relative to the mean squared norm of the features
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


class RandomFeatureModel(nn.Module):
    """f(x_0, keys) = offset + <features(x_0, keys), value>: features are random and frozen, `value` is fitted.

    Args:
        num_features: P, length of the features.
    """

    offset: Tensor

    def __init__(self, num_features: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("offset", torch.zeros(()))

    def features(self, x0: Tensor, keys: Tensor) -> Tensor:
        """(B, P) of queries (B, d) and keys (B, N, d)."""
        raise NotImplementedError

    def forward(self, x0: Tensor, keys: Tensor) -> Tensor:
        """(B,)."""
        return self.offset + self.features(x0, keys) @ self.value

    @torch.no_grad()
    def fit(
        self,
        x0: Tensor,
        keys: Tensor,
        y: Tensor,
        ridge: float | Sequence[float] = 1e-4,
        validation: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> float:
        """Ridge regression of y on the features, solved in float64, in the dual when there are fewer samples than P.

            value = argmin Σ (<features, value> - (y - ȳ))² + λ |value|²,   λ = ridge · mean |features|²

        Args:
            x0: (n, d). keys: (n, N, d). y: (n,).
            ridge: one number above 0, or several, of which the validation samples choose.
            validation: x0, keys and y held out; needed where ridge is several.

        Returns:
            The ridge used.

        Raises:
            ArgumentError: a ridge that is not above 0, or several without validation samples.
            ShapeError: y is not one number per sample.
        """
        ridges = [float(ridge)] if isinstance(ridge, int | float) else [float(value) for value in ridge]
        if not ridges or min(ridges) <= 0:
            raise ArgumentError(f"ridge: expected numbers above 0, got {ridge}")
        if len(ridges) > 1 and validation is None:
            raise ArgumentError(f"validation: expected samples to choose among {len(ridges)} ridges, got None")
        if y.shape != x0.shape[:1]:
            raise ShapeError(f"y: expected ({len(x0)},), got {tuple(y.shape)}")
        features, centred = self.features(x0, keys).double(), (y - y.mean()).double()
        fits = _ridge(features, centred, ridges)
        best = 0
        if validation is not None:
            held_out = self.features(*validation[:2]).double() @ fits.T + y.mean()
            best = int((held_out - validation[2].double()[:, None]).square().mean(0).argmin())
        self.value.copy_(fits[best])
        self.offset.copy_(y.mean())
        return ridges[best]


class RandomFeatureAttention(RandomFeatureModel):
    """One attention layer with M random heads (arXiv:2307.11353): queries (B, d), keys (B, N, d) to (B,).

        f = Σ_m 1/N Σ_i relu(x̃_0ᵀ W_m x̃_i) <v_m, x̃_i>,   x̃ = [x; 1],   W_m = μ diag(1, ..., 1, 0) + σ N(0, 1)

    The W_m stay as drawn and only the v_m are fitted, so the layer is linear regression on M (d + 1) features, and what
    it learns from how many samples is known: averages over keys of a function of key and query, at a price that does
    not grow with N. Exact in the order of the keys; the query is no key. μ > 0 makes <x_0, x_i> the natural variable.
    `regard.tasks.random_features` has targets, `RandomFeatureMLP` is what it is compared with, and
    ``regard study random-features`` prints both. This is not the linear-time attention of the same name.

    Cost: M (d + 1)² + 2 M N (d + 1) multiply-adds per sample, and n² P + n³ / 3 to fit n samples.

    Args:
        dim: d.
        num_heads: M.
        weight_std: σ, of the entries of W_m; 1/2 is the paper's.
        mean_scale: μ; 0 is the unbiased layer.
        activation: "relu", the mean over keys, which the theory is about; or "softmax" over the keys.
        seed: of W_m.
    """

    weight: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        weight_std: float = 0.5,
        mean_scale: float = 0.0,
        activation: str = "relu",
        seed: int = 0,
    ):
        _at_least_one(dim=dim, num_heads=num_heads)
        if not weight_std > 0:
            raise ArgumentError(f"weight_std: expected a number above 0, got {weight_std}")
        if activation not in ("relu", "softmax"):
            raise ArgumentError(f"activation: expected 'relu' or 'softmax', got {activation!r}")
        super().__init__(num_heads * (dim + 1))
        self.dim, self.num_heads, self.activation = dim, num_heads, activation
        noise = torch.randn(num_heads, dim + 1, dim + 1, generator=torch.Generator().manual_seed(seed))
        mean = torch.eye(dim + 1)
        mean[dim, dim] = 0
        self.register_buffer("weight", mean_scale * mean + weight_std * noise)

    def features(self, x0: Tensor, keys: Tensor) -> Tensor:
        """(B, M (d + 1)), head by head 1/N Σ_i relu(x̃_0ᵀ W_m x̃_i) x̃_i."""
        _check(x0, keys, self.dim)
        query, key = _with_one(x0), _with_one(keys)[:, None]  # (B, d+1), (B, 1, N, d+1)
        projected = torch.einsum("bi,mij->bmj", query, self.weight)[:, :, None]  # (B, M, 1, d+1)
        if self.activation == "softmax":
            return attention(projected, key, key, scale=1.0).flatten(1)
        scores = (projected @ key.mT).relu()
        return (scores @ key / keys.shape[1]).flatten(1)


class RandomFeatureMLP(RandomFeatureModel):
    """A random two-layer network over everything in one vector, the baseline (arXiv:2307.11353).

        f = Σ_p v_p relu(<w_p, [x_0; x_1; ...; x_N; 1]>),   w_p uniform on the unit sphere

    It has to find out that the order of the keys does not matter.

    Args:
        dim: d.
        num_keys: N.
        num_features: P, M (d + 1) for as many features as M heads have.
        seed: of w_p.
    """

    weight: Tensor

    def __init__(self, dim: int, num_keys: int, num_features: int, seed: int = 0):
        _at_least_one(dim=dim, num_keys=num_keys, num_features=num_features)
        super().__init__(num_features)
        self.dim, self.num_keys = dim, num_keys
        size = (num_features, (num_keys + 1) * dim + 1)
        weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weight", weight / weight.norm(dim=1, keepdim=True))

    def features(self, x0: Tensor, keys: Tensor) -> Tensor:
        """(B, P)."""
        _check(x0, keys, self.dim)
        if keys.shape[1] != self.num_keys:
            raise ShapeError(f"keys: expected (B, {self.num_keys}, {self.dim}), got {tuple(keys.shape)}")
        return (_with_one(torch.cat([x0, keys.flatten(1)], 1)) @ self.weight.T).relu()


def attention_random_kernel(x: Tensor, other: Tensor, weight_std: float = 0.5) -> Tensor:
    """What <features(X), features(X')> / M of the unbiased relu layer tends to with more heads (arXiv:2307.11353).

        K(X, X') = mean_ij k(u_i, u'_j) <x̃_i, x̃'_j>,   u_i = x̃_0 ⊗ x̃_i
        k(u, u') = σ² |u| |u'| (sin θ + (π - θ) cos θ) / 2π,   cos θ = <u, u'> / |u| |u'|

    Args:
        x: (B, N + 1, d), the query first. other: (B', N' + 1, d).
        weight_std: σ.

    Returns:
        (B, B'), from B B' N' numbers at a time.

    Raises:
        ShapeError: other dimensions, different d, or no keys.
    """
    for name, given in (("x", x), ("other", other)):
        if given.dim() != 3 or given.shape[1] < 2:
            raise ShapeError(f"{name}: expected (B, N + 1, d) with a query and keys, got {tuple(given.shape)}")
    if x.shape[2] != other.shape[2]:
        raise ShapeError(f"other: expected (B, N + 1, {x.shape[2]}), got {tuple(other.shape)}")
    (x0, keys), (y0, others) = ((given[:, 0], given[:, 1:]) for given in (_with_one(x), _with_one(other)))
    queries = x0 @ y0.T
    sizes = x0.norm(dim=-1)[:, None] * y0.norm(dim=-1)
    total = torch.zeros_like(queries)
    for key in keys.unbind(1):
        inner = torch.einsum("bd,cjd->bcj", key, others)
        size = sizes[..., None] * key.norm(dim=-1)[:, None, None] * others.norm(dim=-1)
        cos = (queries[..., None] * inner / size).clamp(-1, 1)
        theta = cos.arccos()
        total += (size * (theta.sin() + (pi - theta) * cos) * inner).sum(-1)
    return total * weight_std**2 / (2 * pi * keys.shape[1] * others.shape[1])


def _ridge(features: Tensor, y: Tensor, ridges: Sequence[float]) -> Tensor:
    """(R, P), one solution per ridge."""
    n, size = features.shape
    dual = n < size
    gram = features @ features.T if dual else features.T @ features
    target = (y if dual else features.T @ y)[:, None]
    unit = features.square().sum() / n
    solutions = []
    for ridge in ridges:
        regular = gram.clone()
        regular.diagonal().add_(ridge * unit)
        solution = torch.cholesky_solve(target, torch.linalg.cholesky(regular))
        solutions.append((features.T @ solution if dual else solution)[:, 0])
    return torch.stack(solutions)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _check(x0: Tensor, keys: Tensor, dim: int) -> None:
    if x0.dim() != 2 or x0.shape[1] != dim:
        raise ShapeError(f"x0: expected (B, {dim}), got {tuple(x0.shape)}")
    if keys.dim() != 3 or keys.shape[0] != x0.shape[0] or keys.shape[1] < 1 or keys.shape[2] != dim:
        raise ShapeError(f"keys: expected ({len(x0)}, N, {dim}), got {tuple(keys.shape)}")


def _at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
