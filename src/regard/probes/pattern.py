"""Where attention goes, as mass per bin of positions, measured through the attention that really runs.

Attention mixes values with weights w; a one-hot indicator c of each key's bin, mixed along with the values, comes out
as the weight of that bin, whatever computes the attention:

    out_i = Σ_j w_ij [v_j, c_j],      c_jb = 1 if key j lies in bin b,      so  mass_ib = Σ_{j in b} w_ij

No N×M matrix is made: the rows of a prompt are averaged per bin of queries as they come.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.sites import Call, Method, Site


@dataclass(eq=False)
class Pattern:
    """Attention mass of one layer. The last column of either tensor is for keys beyond the prompt (generated tokens).

    Attributes:
        edges: bin b holds positions edges[b] <= p < edges[b + 1].
        prompt: (B, H, bins, bins + 1) mean mass the queries of each bin gave to the keys of each bin.
        decoded: (B, H, bins + 1) mass per key bin, of one later token each.
    """

    edges: tuple[int, ...]
    prompt: Tensor
    decoded: list[Tensor] = field(default_factory=list)


@dataclass(kw_only=True)
class PatternProbe(Method):
    """Record the attention pattern of a prompt and of the tokens decoded after it; changes nothing.

        probe = PatternProbe(bins=64, layers=[5, 15, 25])
        with regard.apply(model, [H2O(), probe]):
            model.generate(...)
        probe.patterns[15].prompt

    The prompt is what enters with an empty cache, and starts a new record; tokens of later forwards count as decoded.
    Put the probe after the methods it is to watch.

    Args:
        bins: number of bins the prompt's positions are divided into (fewer for a prompt with fewer tokens).
    """

    name: ClassVar[str] = "pattern-probe"
    bins: int = 64

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ArgumentError(f"bins must be at least 1, got {self.bins}")
        #: by layer index
        self.patterns: dict[int, Pattern] = {}

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        if self.layers is not None and (unknown := set(self.layers) - {site.index for site in sites}):
            raise ArgumentError(f"layers: the model has layers 0..{len(sites) - 1}, got {sorted(unknown)}")
        self.patterns = {}

    def qkv(self, call: Call) -> None:
        last, m = _positions(call)[:, -1:], call.key.shape[2]
        if call.past == 0:
            self.patterns[call.site.index] = self._start(call)
        positions = call.key_positions
        if positions is None:  # nothing was dropped: the keys end with the newest token
            positions = (last - (m - 1) + torch.arange(m, device=last.device))[:, None]
        call.probe = self._indicator(call, positions)

    def after(self, call: Call) -> None:
        mass, pattern = call.extra["probe"].float(), self.patterns[call.site.index]
        if call.past > 0:
            pattern.decoded += [row.cpu() for row in mass.unbind(2)]
            return
        rows = self._indicator(call, _positions(call)[:, None])[..., :-1]  # (B, 1, N, bins)
        if call.step.valid is not None:
            rows = rows * call.step.valid[:, None, :, None]
        count = rows.sum(2)[..., None].clamp(min=1)
        pattern.prompt = (rows.mT @ mass / count).cpu()

    def _start(self, call: Call) -> Pattern:
        """An empty record whose bins divide the positions of this prompt evenly."""
        length = int(_positions(call).max()) + 1
        bins = min(self.bins, length)
        edges = tuple(length * i // bins for i in range(bins + 1))
        return Pattern(edges, torch.zeros(call.query.shape[0], call.query.shape[1], bins, bins + 1))

    def _indicator(self, call: Call, positions: Tensor) -> Tensor:
        """One-hot bin of each position: (..., M) -> (..., M, bins + 1)."""
        edges = torch.tensor(self.patterns[call.site.index].edges, device=positions.device)
        bins = torch.bucketize(positions.clamp(min=0).long(), edges, right=True) - 1
        return F.one_hot(bins, len(edges)).float()


def _positions(call: Call) -> Tensor:
    """(B or 1, N) positions of the call's queries."""
    assert call.step.positions is not None  # every call inside `regard.apply` has them
    return call.step.positions
