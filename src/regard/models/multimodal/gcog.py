"""Small readers of a rule and a scene, with and without attention between the two (arXiv:2401.15030)."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.models.multimodal.gcog_layers import Attention, Block, Positions, Tokens, own_weights

Pad = Literal["ignore", "right"]
_ARGUMENTS = {
    "num_rule_inputs": "rule_dim",
    "num_stim_inputs": "stim_dim",
    "nhead": "num_heads",
    "nblocks": "num_blocks",
    "max_tree_depth": "max_rule_length",
    "embedding_dim": "dim",
    "num_hidden": "hidden_dim",
    "num_motor_decision_outputs": "num_classes",
    "positional_encoding": "positions",
    "dropout": "dropout",
}
_OF_TRAINING = ("learning_rate", "lossfunc", "num_rnn_layers")


class RuleReader(nn.Module, PyTorchModelHubMixin):
    """A rule (B, N, 8) and a scene (B, M, 3) to the log-probabilities (B, num_classes) of the answers.

    Args:
        width: of what `read` returns.
        num_classes: of the answers.
        rule_dim, stim_dim: of the inputs.
        pad: "ignore" (rows of zeros in the rule are padding: unseen, uncounted, never the last token) or "right" (as
            published: they are tokens, and the last of them is read).
        skip_empty: leave out the scene's rows of zeros, its empty cells, which carry nothing but that they are empty;
            the others keep their positions. As published they are tokens, most of 101.
    """

    #: weights and arguments that the published class has and never uses
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, width: int, num_classes: int, rule_dim: int, stim_dim: int, pad: Pad, skip_empty: bool):
        super().__init__()
        if pad not in ("ignore", "right"):
            raise ArgumentError(f"pad: expected 'ignore' or 'right', got {pad!r}")
        self.rule_dim, self.stim_dim, self.pad, self.skip_empty = rule_dim, stim_dim, pad, skip_empty
        self.head = nn.Linear(width, num_classes)

    def forward(self, rule: Tensor, stim: Tensor) -> Tensor:
        """Log-probabilities; ``stim`` may be (B, M, 3, 1) too.

        Raises:
            ShapeError: not these shapes.
            ArgumentError: a rule of nothing but padding.
        """
        stim = stim.squeeze(-1) if stim.dim() == 4 else stim
        for name, given, dim in (("rule", rule, self.rule_dim), ("stim", stim, self.stim_dim)):
            if given.dim() != 3 or given.shape[-1] != dim or len(given) != len(rule):
                raise ShapeError(f"{name}: expected ({len(rule)}, tokens, {dim}), got {tuple(given.shape)}")
        valid = rule.ne(0).any(-1)
        if self.pad == "ignore" and not bool(valid.any(1).all()):
            raise ArgumentError("rule: expected at least one row that is not zeros (padding) in each")
        ignored = self.pad == "ignore" and not bool(valid.all())
        scene = Tokens.nonzero(stim) if self.skip_empty else Tokens.of(stim)
        return F.log_softmax(self.head(self.read(Tokens.of(rule, valid if ignored else None), scene)), -1)

    def read(self, rule: Tokens, stim: Tokens) -> Tensor:
        """What the classifier gets, (B, hidden_dim)."""
        raise NotImplementedError

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> Self:
        """A model of the published code, from its constructor's arguments; padding counts as it does there.

        Raises:
            ArgumentError: an unknown argument, or weights that do not fit.
        """
        if unknown := official_kwargs.keys() - _ARGUMENTS.keys() - set(_OF_TRAINING):
            raise ArgumentError(f"unknown arguments {sorted(unknown)}; expected {', '.join(_ARGUMENTS)}")
        config = {own: official_kwargs[name] for name, own in _ARGUMENTS.items() if name in official_kwargs}
        model = cls(**{own: value for own, value in config.items() if own not in cls.unused}, pad="right")
        weights = own_weights(state_dict)
        load_strictly(model, {k: v for k, v in weights.items() if k.partition(".")[0] not in cls.unused})
        return model.eval()


class SingleStream(RuleReader):
    """One stack of blocks over the tokens of the rule and then those of the scene (published as ``SSTFMR``).

    Both are padded with zeros to 8 + 3 features and projected; the last token is classified. The blocks have MLPs of
    width 4 E with GELU.

    Args:
        dim: E, of the tokens.
        num_heads: of the attention.
        num_blocks: how many.
        max_rule_length, max_stim_length: most tokens.
        positions: "absolute", or "relative" and causal.
        dropout: as in `Block`.
    """

    unused = ("hidden_dim",)

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 1,
        num_blocks: int = 1,
        num_classes: int = 138,
        rule_dim: int = 8,
        stim_dim: int = 3,
        max_rule_length: int = 100,
        max_stim_length: int = 101,
        positions: Positions = "absolute",
        dropout: float = 0.0,
        pad: Pad = "ignore",
        skip_empty: bool = False,
    ):
        super().__init__(dim, num_classes, rule_dim, stim_dim, pad, skip_empty)
        if num_blocks < 1:
            raise ArgumentError(f"num_blocks: expected at least 1, got {num_blocks}")
        length = max_rule_length + max_stim_length
        self.embed = nn.Linear(rule_dim + stim_dim, dim)
        self.blocks = nn.ModuleList(
            Block(None, dim, num_heads, length, 4 * dim, nn.GELU, positions, dropout) for _ in range(num_blocks)
        )

    def read(self, rule: Tokens, stim: Tokens) -> Tensor:
        rule = rule._replace(x=F.pad(rule.x, (0, self.stim_dim)))
        tokens = rule.followed_by(stim._replace(x=F.pad(stim.x, (self.rule_dim, 0))))
        tokens = tokens._replace(x=self.embed(tokens.x))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.last


class TwoStreams(RuleReader):
    """A block for the rule's tokens and one for the scene's; what follows is for the subclass to `build`.

    Args:
        dim: E, of the tokens.
        num_heads: of all attention.
        hidden_dim: of what comes after the blocks.
        max_rule_length, max_stim_length: most tokens.
        positions: of the rule's block, "absolute" or "relative" (and causal); scenes have absolute ones.
        dropout: as in `Block`, of all other attention's weights, and between norms and layers.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 1,
        hidden_dim: int = 256,
        num_classes: int = 138,
        rule_dim: int = 8,
        stim_dim: int = 3,
        max_rule_length: int = 100,
        max_stim_length: int = 101,
        positions: Positions = "absolute",
        dropout: float = 0.0,
        pad: Pad = "ignore",
        skip_empty: bool = False,
    ):
        super().__init__(hidden_dim, num_classes, rule_dim, stim_dim, pad, skip_empty)
        self.rule_block = Block(rule_dim, dim, num_heads, max_rule_length, dim, positions=positions, dropout=dropout)
        self.stim_block = Block(stim_dim, dim, num_heads, max_stim_length, dim, dropout=dropout)
        self.build(dim, num_heads, hidden_dim, dropout)

    def build(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        """Make the layers after the blocks."""
        raise NotImplementedError


class DoubleStream(TwoStreams):
    """No attention between the two (published as ``Transformer``).

    ``LN(MLP(LN(ReLU(W r) + ReLU(W' s))))`` of the last tokens r and s, the MLP of three layers with ReLU.
    """

    def build(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        self.rule_proj, self.stim_proj = nn.Linear(dim, hidden_dim), nn.Linear(dim, hidden_dim)
        self.norm, self.out_norm = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        widths = (hidden_dim, 2 * hidden_dim, 2 * hidden_dim, hidden_dim)
        layers = ((nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
        self.fnn = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.dropout = nn.Dropout(dropout)

    def read(self, rule: Tokens, stim: Tokens) -> Tensor:
        r, s = self.rule_block(rule).last, self.stim_block(stim).last
        x = self.dropout(self.norm(F.relu(self.rule_proj(r)) + F.relu(self.stim_proj(s))))
        return self.dropout(self.out_norm(self.fnn(x)))


class RuleQueriesStimulus(TwoStreams):
    """The rule's tokens r attend to the scene's s (published as ``SimpleCrossAttn``).

    ``LN(MLP(LN(attention(r, s)) + r))`` of the last token, the MLP of two layers with ReLU.
    """

    def build(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        self.cross = Attention(dim, dim, num_heads, dropout)
        self.cross_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(hidden_dim)
        layers = {"fc1": nn.Linear(dim, hidden_dim), "act1": nn.ReLU(), "fc2": nn.Linear(hidden_dim, hidden_dim)}
        self.mlp = nn.Sequential(OrderedDict(layers | {"act2": nn.ReLU()}))

    def read(self, rule: Tokens, stim: Tokens) -> Tensor:
        r, s = self.rule_block(rule).last[:, None], self.stim_block(stim)
        x = self.cross_norm(self.cross(r, s.x, s.valid)) + r
        return self.mlp_norm(self.mlp(x))[:, 0]


class LatentCrossAttention(TwoStreams):
    """One latent z, zero at first, attends to the rule and then to the scene (published as ``TransformerCrossAttn``).

    ``z = LN(attention(z, tokens) + z)`` twice, with the same norm.
    """

    unused = ("latent_norm",)

    def build(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        self.rule_cross = Attention(hidden_dim, dim, num_heads, dropout)
        self.stim_cross = Attention(hidden_dim, dim, num_heads, dropout)
        self.cross_norm = nn.LayerNorm(hidden_dim)

    def read(self, rule: Tokens, stim: Tokens) -> Tensor:
        r, s = self.rule_block(rule), self.stim_block(stim)
        z = r.x.new_zeros(len(r.x), 1, self.head.in_features)
        z = self.cross_norm(self.rule_cross(z, r.x, r.valid) + z)
        return self.cross_norm(self.stim_cross(z, s.x, s.valid) + z)[:, 0]


class PerceiverReader(TwoStreams):
    """Ten latents z, zero at first, attend to the rule and then to the scene (published as ``Perceiver``).

        c = LN(attention(z, tokens));  z = LN_z(z + c + ReLU(W c));  z = LN_z(z + attention(z))      for each

    LN_z and the attention among latents are shared; the last latent of ``ReLU(W z)`` is classified. Latents that begin
    alike stay alike: with these as published, ten compute what one does.
    """

    num_latents: ClassVar[int] = 10

    def build(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        self.rule_cross = Attention(hidden_dim, dim, num_heads, dropout)
        self.stim_cross = Attention(hidden_dim, dim, num_heads, dropout)
        self.latent_attn = Attention(hidden_dim, hidden_dim, num_heads, dropout)
        self.rule_norm, self.stim_norm, self.latent_norm = (nn.LayerNorm(hidden_dim) for _ in range(3))
        self.rule_proj, self.stim_proj, self.latent_proj = (nn.Linear(hidden_dim, hidden_dim) for _ in range(3))

    def read(self, rule: Tokens, stim: Tokens) -> Tensor:
        r, s = self.rule_block(rule), self.stim_block(stim)
        z = r.x.new_zeros(len(r.x), self.num_latents, self.head.in_features)
        c = self.rule_norm(self.rule_cross(z, r.x, r.valid))
        z = self._together(z, c + F.relu(self.rule_proj(c)))
        c = self.stim_norm(self.stim_cross(z, s.x, s.valid))
        z = self._together(z, c + F.relu(self.stim_proj(c)))
        return F.relu(self.latent_proj(z))[:, -1]

    def _together(self, z: Tensor, c: Tensor) -> Tensor:
        z = self.latent_norm(z + c)
        return self.latent_norm(z + self.latent_attn(z, z))
