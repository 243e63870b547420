"""Made-up speech whose alignment is known: each token is spoken in four frames, after the one before it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError

SPAN = 4  # frames of a token: one frame of an encoder that takes four together


class Utterances(NamedTuple):
    """features (B, T, F), tokens (B, I) from 0 to vocab_size - 1, starts (B, I): the first frame of each token."""

    features: Tensor
    tokens: Tensor
    starts: Tensor


@dataclass(frozen=True)
class AlignedSpeech:
    """Spectrograms in which token i is spoken in one of the slots that are its own, and noise is everywhere.

    The sound of a token is two bands of energy that glide, drawn once for each token of the vocabulary. Tokens are
    independent of each other, so nothing but the sound in their four frames says what they are, and which of its slots
    a token is in is only to be heard. Features have mean 0 and standard deviation 1, so 0 hides.

    Args:
        num_tokens: I.
        vocab_size: different tokens.
        slots: of each token, four frames each; T = 4 · slots · I.
        channels: F.
        noise: standard deviation beside sounds of height 1.
        seed: of the sounds.
    """

    num_tokens: int = 6
    vocab_size: int = 12
    slots: int = 2
    channels: int = 16
    noise: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_tokens", 1), ("vocab_size", 2), ("slots", 1), ("channels", 4)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.noise < 0:
            raise ArgumentError(f"noise: expected at least 0, got {self.noise}")

    @property
    def frames(self) -> int:
        """T."""
        return SPAN * self.slots * self.num_tokens

    @cached_property
    def sounds(self) -> Tensor:
        """(vocab_size, 4, F)."""
        g = torch.Generator().manual_seed(self.seed)
        centre = torch.rand(self.vocab_size, 2, 1, 1, generator=g) * (self.channels - 1)
        glide = torch.rand(self.vocab_size, 2, 1, 1, generator=g) * 2 - 1
        path = centre + glide * (torch.arange(SPAN) - (SPAN - 1) / 2).view(1, 1, SPAN, 1)
        bands = torch.exp(-0.5 * (torch.arange(self.channels) - path).square())
        return bands.amax(1)

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Utterances:
        """Fresh utterances."""
        tokens = torch.randint(self.vocab_size, (batch, self.num_tokens), generator=generator)
        slot = torch.randint(self.slots, tokens.shape, generator=generator)
        starts = SPAN * (self.slots * torch.arange(self.num_tokens) + slot)
        features = self.noise * torch.randn(batch, self.frames, self.channels, generator=generator)
        frame = starts[..., None] + torch.arange(SPAN)
        features[torch.arange(batch)[:, None, None], frame] += self.sounds[tokens]
        features = features - features.mean((1, 2), keepdim=True)
        return Utterances(features / features.std((1, 2), keepdim=True), tokens, starts)
