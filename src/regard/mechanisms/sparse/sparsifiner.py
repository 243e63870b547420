"""Sparsifiner: a small low-rank predictor says which token pairs matter, and attention sees only those."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import Mechanism, Pattern, check_rate


class Connectivity(NamedTuple):
    """What a predictor says about N tokens.

    Attributes:
        mask: (B, H, N, N) bool, which pairs attention sees; the class token, which is first, sees all.
        approx: (B, H, N - 1, N), the approximate attention of all other tokens.
        coef: (B, H, N - 1, r), the coefficients it is made of.
        basis: (r, N), the attention maps it is made of.
    """

    mask: Tensor
    approx: Tensor
    coef: Tensor
    basis: Tensor

    def sparsity(self) -> Tensor:
        """Shares of zeros in basis, coefficients and mask, (3,)."""
        return torch.stack([(t == 0).float().mean() for t in (self.basis, self.coef, self.mask)])


class Selection(NamedTuple):
    """What `SparsifinerAttention.attend` chose.

    Attributes:
        query, key: (B, H, N, D).
        scale: of their products.
        connectivity: of the predictor.
        tokens: (B, N - 1) bool, the tokens that go on to the next layer; None where none has been pruned yet.
        dense: whether attention was dense all the same, for the predictor to learn from.
    """

    query: Tensor
    key: Tensor
    scale: float
    connectivity: Connectivity
    tokens: Tensor | None
    dense: bool

    def weights(self) -> Tensor:
        """The attention (B, H, N, N) that was applied."""
        return self._weights(None if self.dense else self.connectivity.mask)

    def dense_weights(self) -> Tensor:
        """The attention (B, H, N, N) of the same queries and keys without a mask."""
        return self._weights(None)

    def _weights(self, mask: Tensor | None) -> Tensor:  # attention to indicators of the keys is the weights
        each = torch.eye(self.key.shape[2], dtype=self.key.dtype, device=self.key.device)
        return attention(self.query, self.key, each.expand(*self.key.shape[:2], -1, -1), mask=mask, scale=self.scale)


class MaskPredictor(nn.Module):
    """Guesses attention at low rank and keeps its largest entries: q and k (B, H, N, D) to `Connectivity`.

        coef = softmax_r(s · (q Wq) ((k Wk)ᵀ P))       Wq, Wk: D to c = D / reduce_c,  P: (N, r), r = N / reduce_n
        approx = top(coef) · |U|                       U: (r, N), entries of |U| up to ``basis_threshold`` are 0
        mask = approx among the largest ⌈keep_rate N⌉ of its row, or above ``score_threshold``

    The mask has no gradient. What trains the predictor is a loss on ``approx``, in which U then stands with its signs
    and no coefficient is dropped.

    Args:
        head_dim, num_tokens: D and N, the class token among them.
        scale: s.
        keep_rate, score_threshold: one of them is given; a threshold may leave rows empty.
        reduce_n, reduce_c: as above.
        share_basis: U = Pᵀ.
        basis_threshold: as above.
        coef_topk, coef_threshold: keep so many coefficients of each token, or those above; all by default.
        prune_rows: pruned tokens see nothing either.
    """

    def __init__(
        self,
        head_dim: int,
        num_tokens: int,
        scale: float,
        keep_rate: float | None = 0.25,
        score_threshold: float | None = None,
        reduce_n: float = 8,
        reduce_c: float = 2,
        share_basis: bool = False,
        basis_threshold: float = 0.0,
        coef_topk: int | None = None,
        coef_threshold: float = 0.0,
        prune_rows: bool = False,
    ):
        super().__init__()
        narrow, rank = int(head_dim // reduce_c), int(num_tokens // reduce_n)
        if narrow < 1:
            raise ArgumentError(f"reduce_c: expected at most the head dimension {head_dim}, got {reduce_c}")
        if rank < 1:
            raise ArgumentError(f"reduce_n: expected at most num_tokens, {num_tokens}, got {reduce_n}")
        if (keep_rate is None) == (score_threshold is None):
            raise ArgumentError(
                f"score_threshold: expected one of it and the keep rate, got {score_threshold} and {keep_rate}"
            )
        if coef_topk is not None and not 1 <= coef_topk <= rank:
            raise ArgumentError(f"coef_topk: expected 1 to {rank} (num_tokens / reduce_n), got {coef_topk}")
        self.scale, self.prune_rows = scale, prune_rows
        self.budget = None if keep_rate is None else math.ceil(check_rate("attn_keep_rate", keep_rate) * num_tokens)
        self.score_threshold, self.basis_threshold = score_threshold, basis_threshold
        self.coef_topk, self.coef_threshold = coef_topk, coef_threshold
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, narrow), nn.Linear(head_dim, narrow)
        self.proj_n = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, rank), std=0.02))
        self.proj_back_n = (
            None if share_basis else nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, rank), std=0.02))
        )

    def forward(self, q: Tensor, k: Tensor, tokens: Tensor | None = None, learning: bool = False) -> Connectivity:
        """``tokens`` (B, N - 1): which are left; ``learning``: leave U signed and the coefficients dense."""
        q, k = self.proj_c_q(q), self.proj_c_k(k)
        if tokens is not None:
            q, k = blank(q, tokens), blank(k, tokens)
        coef = ((q @ (k.mT @ self.proj_n))[:, :, 1:] * self.scale).softmax(-1)
        basis = (self.proj_n if self.proj_back_n is None else self.proj_back_n).mT
        if not learning:
            basis = F.threshold(basis.abs(), self.basis_threshold, 0.0)
            if self.coef_topk is not None:
                largest, where = coef.topk(self.coef_topk, sorted=False)
                coef = torch.zeros_like(coef).scatter(-1, where, largest)
            else:
                coef = F.threshold(coef, self.coef_threshold, 0.0)
        approx = coef @ basis
        mask = self.choose(approx.detach(), tokens)
        return Connectivity(F.pad(mask, (0, 0, 1, 0), value=True), approx, coef, basis)

    def choose(self, approx: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The mask (B, H, N - 1, N) of an approximation; among equal entries the choice is `torch.topk`'s."""
        if tokens is not None:
            approx = approx.masked_fill(~F.pad(tokens, (1, 0), value=True)[:, None, None], -math.inf)
        if self.budget is None:
            assert self.score_threshold is not None
            mask = approx > self.score_threshold
        elif tokens is None:
            mask = _marked(approx, approx.topk(self.budget).indices, True)
        else:
            left = tokens.sum(-1).clamp(max=self.budget)
            where = approx.topk(int(left.max())).indices
            mask = _marked(
                approx, where, torch.arange(where.shape[-1], device=where.device) < left[:, None, None, None]
            )
        return mask & tokens[:, None, :, None] if tokens is not None and self.prune_rows else mask


class SparsifinerAttention(Mechanism):
    """Attention of a vision transformer on predicted pairs (Sparsifiner, arXiv:2303.13755).

        y = Wo softmax(q kᵀ / √D | mask) v         mask = MaskPredictor(q, k)

    x (B, N, C) to (B, N, C). N is fixed, since the predictor's basis has N columns, and the first token is the class
    token, which sees all. Exact on the kept pairs; tokens that see nothing get zeros. The released predictor scales by
    1/√H, not by 1/√D, and so does this one. The mask has no structure to gain time from: it is computed densely.

    No gradient reaches the predictor through the mask. Its parameters are frozen until ``reconstruct()``, in which
    state attention in training is dense and a loss on ``approx`` (`attend`) trains them.

    Args:
        dim, num_heads: C and H.
        num_tokens: N, the class token among them.
        attn_keep_rate: share of the pairs of a row that are kept; None where ``score_threshold`` decides.
        token_keep_rate: keep only so many tokens for later layers, by the class token's attention; see `attend`.
        reduce_n, reduce_c: the predictor has N / reduce_n attention maps, and heads of D / reduce_c channels.
        share_inout_proj: one matrix makes the predictor's attention maps and averages its keys.
        basis_threshold: entries of the attention maps up to this are 0.
        coef_topk, coef_threshold: combine only so many maps per token, or those weighted above the threshold.
        score_threshold: keep the pairs whose approximation is above this; rows may become empty.
        prune_rows: pruned tokens see nothing.
        qkv_bias: of the query, key and value projection.
        qk_scale: of attention, 1/√D by default.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    cost: ClassVar[str] = "O(N² C)"
    example: ClassVar[dict[str, Any]] = {"num_tokens": 100}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_tokens: int = 197,
        attn_keep_rate: float | None = 0.25,
        token_keep_rate: float | None = None,
        reduce_n: float = 8,
        reduce_c: float = 2,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.0,
        coef_topk: int | None = None,
        coef_threshold: float = 0.0,
        score_threshold: float | None = None,
        prune_rows: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ):
        super().__init__()
        head_dim, _ = per_head(dim, num_heads)
        if num_tokens < 2:
            raise ArgumentError(f"num_tokens: expected a class token and others, got {num_tokens}")
        self.dim, self.num_heads, self.num_tokens, self.causal = dim, num_heads, num_tokens, False
        self.scale = head_dim**-0.5 if qk_scale is None else qk_scale
        self.token_budget = None
        if token_keep_rate is not None:
            self.token_budget = math.ceil(check_rate("token_keep_rate", token_keep_rate) * (num_tokens - 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mask_predictor = MaskPredictor(
            head_dim,
            num_tokens,
            num_heads**-0.5,
            attn_keep_rate,
            score_threshold,
            reduce_n,
            reduce_c,
            share_inout_proj,
            basis_threshold,
            coef_topk,
            coef_threshold,
            prune_rows,
        )
        self.reconstruct(False)

    def reconstruct(self, mode: bool = True) -> "SparsifinerAttention":
        """Whether the predictor learns: then attention in training mode is dense, and no tokens are pruned."""
        self.reconstructing = mode
        self.mask_predictor.requires_grad_(mode)
        return self

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        if valid is not None and not bool(valid.all()):
            raise Unsupported(f"valid: the {self.num_tokens} tokens are an image's, none may be padding")
        return self.attend(x)[0]

    def attend(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Selection]:
        """The output, and what was chosen.

        Args:
            x: (B, N, C).
            tokens: (B, N - 1) bool, those that earlier layers left; all by default. The others count as zeros, which
                only the class token sees.
        """
        self._check(x, dim=self.dim)
        if x.shape[1] != self.num_tokens:
            raise ShapeError(f"x: expected the {self.num_tokens} tokens of num_tokens, got {x.shape[1]}")
        if tokens is not None and (tokens.dtype != torch.bool or tokens.shape != (x.shape[0], x.shape[1] - 1)):
            raise ShapeError(
                f"tokens: expected bool {(x.shape[0], x.shape[1] - 1)}, got {tokens.dtype} {tuple(tokens.shape)}"
            )
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        if tokens is not None and not self.reconstructing:
            q, k, v = (blank(t, tokens) for t in (q, k, v))
        learning = self.training and self.reconstructing
        found = self.mask_predictor(q, k, tokens, learning)
        y = self.proj(merge_heads(attention(q, k, v, mask=None if learning else found.mask, scale=self.scale)))
        if self.token_budget is not None and not self.reconstructing:
            tokens = self._prune(q, k, self.token_budget, tokens)
        return y, Selection(q, k, self.scale, found, tokens, learning)

    def _prune(self, q: Tensor, k: Tensor, budget: int, tokens: Tensor | None) -> Tensor:
        """The tokens to which the class token attends most; one that was pruned never comes back."""
        score = (q[:, :, :1] @ k.mT * self.scale).softmax(-1).mean(1)[:, 0, 1:]
        if tokens is not None:
            score = score.masked_fill(~tokens, -math.inf)
        kept = _marked(score, score.topk(budget).indices, True)
        return kept if tokens is None else kept & tokens

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "SparsifinerAttention":
        """Weights and arguments of the published ``Attention``; its configuration as `official_config` reads it."""
        kwargs = {"num_heads": 8, "num_tokens": 197, "qkv_bias": False, **official_kwargs}
        config, reconstructing = official_config(kwargs)
        attn_rate, token_rate = kwargs.pop("attn_keep_rate", 0.25), kwargs.pop("token_keep_rate", 0.5)
        config["attn_keep_rate"] = attn_rate if config["score_threshold"] is None else None
        config["token_keep_rate"] = token_rate if kwargs.pop("token_pruning_this_layer", False) else None
        config |= take(kwargs, ("dim", "num_heads", "num_tokens", "qkv_bias"), ignored=("attn_drop", "proj_drop"))
        module = cls(**config)
        load_strictly(module, without_shared_basis(state_dict, module.mask_predictor.proj_back_n is None))
        return module.reconstruct(reconstructing)


def blank(x: Tensor, tokens: Tensor) -> Tensor:
    """x (B, H, N, D) with zeros at the pruned tokens; ``tokens`` (B, N - 1) leaves the class token out."""
    return x.masked_fill(~F.pad(tokens, (1, 0), value=True)[:, None, :, None], 0.0)


def official_config(kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Take from published arguments what concerns the predictor: our arguments, and whether it is reconstructing.

    ``cfg.SPAR`` and ``cfg.LOSS.USE_ATTN_RECON`` are entries of the published global configuration. Without a threshold
    on scores, ``score_threshold`` is None, and keep rates decide.
    """
    spar = kwargs.pop("cfg.SPAR", {})
    by_rank = spar.get("SCORE_USE_TOPK", False)
    if not by_rank and not spar.get("SCORE_THRESHOLD", 0.0) > 0:
        raise Unsupported("cfg.SPAR: neither SCORE_USE_TOPK nor a SCORE_THRESHOLD above 0; published code refuses that")
    config = {
        "reduce_n": kwargs.pop("reduce_n_factor", 8),
        "reduce_c": kwargs.pop("reduce_c_factor", 2),
        "share_inout_proj": kwargs.pop("share_inout_proj", False),
        "basis_threshold": spar.get("BASIS_THRESHOLD", 0.0),
        "coef_topk": spar.get("COEF_TOPK", 8) if spar.get("COEF_USE_TOPK", False) else None,
        "coef_threshold": max(0.0, spar.get("COEF_THRESHOLD", 0.0)),
        "score_threshold": None if by_rank else spar["SCORE_THRESHOLD"],
        "prune_rows": spar.get("PRUNE_ROW", False),
        "qk_scale": kwargs.pop("qk_scale", None) or None,
    }
    return config, kwargs.pop("cfg.LOSS.USE_ATTN_RECON", False)


def take(kwargs: dict[str, Any], names: Sequence[str], ignored: Sequence[str]) -> dict[str, Any]:
    """The published arguments called as ours are, after which none may be left but those ignored here."""
    if unknown := kwargs.keys() - {*names, *ignored}:
        raise ArgumentError(f"official_kwargs: unknown {', '.join(sorted(unknown))}")
    return {name: kwargs[name] for name in names if name in kwargs}


def without_shared_basis(state_dict: dict[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """A shared basis stands twice in published weights."""
    return {name: t for name, t in state_dict.items() if not (shared and name.endswith("proj_back_n"))}


def _marked(like: Tensor, where: Tensor, value: Tensor | bool) -> Tensor:
    """A bool tensor that is ``value`` at the indices ``where`` of the last axis and False elsewhere."""
    source = torch.as_tensor(value, device=like.device).expand(where.shape)
    return torch.zeros_like(like, dtype=torch.bool).scatter(-1, where, source)
