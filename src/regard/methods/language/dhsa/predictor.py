"""Boundary predictors of DHSA: does a new chunk begin after this token?

Each looks, for every position t, at the 2W keys t - W + 1 .. t + W (all key heads side by side, zeros beyond the ends),
summarises the left and the right half as vectors l and r, and judges how much they differ:

    logit_t = MLP([l, r, |l - r|, l ∘ r, cos(l, r)])

The three differ in how windows become l and r. Parameter names are the published ones, so official weights load as they
are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ShapeError

_WINDOWS_AT_ONCE = 2048  # positions encoded together where no gradient is needed: bounds the unfolded windows


class BoundaryPredictor(nn.Module):
    """What the predictors share: windows, runs of positions and the final comparison. Subclasses encode windows."""

    def __init__(self, channel_in: int, window_size: int, encoded: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.channel_in, self.window_size, self.eps = channel_in, window_size, eps
        self.mlp = nn.Sequential(nn.Linear(4 * encoded + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def encode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right summary (P, encoded) of windows (P, 2W, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) that position t ends a chunk, from features (B, C, L)."""
        if x.dim() != 3 or x.shape[1] != self.channel_in:
            raise ShapeError(f"x: expected shape (batch, {self.channel_in}, length), got {tuple(x.shape)}")
        w = self.window_size
        windows = F.pad(x, (w - 1, w)).unfold(2, 2 * w, 1).permute(0, 2, 3, 1)  # (B, L, 2W, C)
        runs = [windows] if torch.is_grad_enabled() else windows.split(_WINDOWS_AT_ONCE, dim=1)
        return torch.cat([self._judge(run) for run in runs], dim=1)

    def _judge(self, windows: Tensor) -> Tensor:
        left, right = self.encode(windows.flatten(0, 1))
        similarity = F.cosine_similarity(left, right, dim=-1, eps=self.eps).unsqueeze(-1)
        features = torch.cat((left, right, (left - right).abs(), left * right, similarity), dim=-1)
        return self.mlp(features).view(windows.shape[:2])


class BoundarySimilarity(BoundaryPredictor):
    """Convolutional: a depthwise convolution over each half, then a pointwise one."""

    def __init__(self, channel_in: int, window_size: int = 4, d_h: int = 256, d_in: int = 256) -> None:
        super().__init__(channel_in, window_size, d_h, d_in, eps=1e-6)
        self.enc = nn.Sequential(
            nn.Conv1d(channel_in, channel_in, kernel_size=window_size, groups=channel_in),
            nn.ReLU(),
            nn.Conv1d(channel_in, d_h, kernel_size=1),
            nn.ReLU(),
        )

    def encode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        left, right = windows.mT.split(self.window_size, dim=-1)
        return self.enc(left).squeeze(-1), self.enc(right).squeeze(-1)


class BoundarySimilarityAttn(BoundaryPredictor):
    """One self-attention over the window, normalised, without a residual."""

    def __init__(
        self, channel_in: int, window_size: int = 4, d_h: int = 256, heads: int = 4, window_pool: bool = False
    ) -> None:
        super().__init__(channel_in, window_size, channel_in, d_h, eps=1e-6)
        self.enc = _WindowAttention(channel_in, heads)
        self.pool = _GatedPool(channel_in) if window_pool else None

    def encode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        return _halves(self.enc(windows), self.window_size, self.pool)


class BoundarySimilarityStack(BoundaryPredictor):
    """Residual self-attentions over the window: ``x += dropout(enc(norm(x)))``, with one `norm` shared by all."""

    def __init__(
        self,
        channel_in: int,
        n_blocks: int = 4,
        window_size: int = 4,
        d_h: int = 256,
        heads: int = 4,
        window_pool: bool = False,
        p_drop: float = 0.1,
    ) -> None:
        super().__init__(channel_in, window_size, channel_in, d_h, eps=1e-8)
        self.enc_ls = nn.ModuleList([_WindowAttention(channel_in, heads) for _ in range(n_blocks)])
        self.dropout = nn.Dropout(p_drop)
        self.norm = nn.LayerNorm(channel_in)
        self.pool = _GatedPool(channel_in) if window_pool else None

    def encode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        x = windows
        for encoder in self.enc_ls:
            x = x + self.dropout(encoder(self.norm(x)))
        return _halves(x, self.window_size, self.pool)


class _WindowAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, window: Tensor) -> Tensor:
        mixed, _ = self.mha(window, window, window, need_weights=False)
        return self.norm(mixed)


class _GatedPool(nn.Module):
    """A mean over tokens (P, W, C) weighted by the softmax of a linear score."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.gate(tokens).softmax(dim=1) * tokens).sum(dim=1)


def _halves(encoded: Tensor, window_size: int, pool: nn.Module | None) -> tuple[Tensor, Tensor]:
    left, right = encoded.split(window_size, dim=1)
    return (left.mean(1), right.mean(1)) if pool is None else (pool(left), pool(right))
