"""Sparsifiner's vision transformer (arXiv:2303.13755): predicted sparse attention and token pruning."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import DropPath, drop_path_rates
from regard.mechanisms.sparse.sparsifiner import (
    Selection,
    SparsifinerAttention,
    official_config,
    take,
    without_shared_basis,
)


class SparsifinerOutput(NamedTuple):
    """What a pass through `Sparsifiner` gave.

    Attributes:
        logits: (B, num_classes).
        features: (B, N - 1, C), the patches after the last norm.
        layers: what each layer chose, and the attention it had (``weights()``, ``dense_weights()``).
    """

    logits: Tensor
    features: Tensor
    layers: tuple[Selection, ...]


class SparsifinerBlock(nn.Module):
    """A pre-norm block that hands on which tokens are left; the others are zeros at its end."""

    def __init__(self, attention: SparsifinerAttention, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        dim = attention.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.mlp.act = nn.Sequential(self.mlp.act, nn.Dropout(drop))
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor | None) -> tuple[Tensor, Selection]:
        mixed, chosen = self.attn.attend(self.norm1(x), tokens)
        x = x + self.drop_path(self.drop(mixed))
        x = x + self.drop_path(self.drop(self.mlp(self.norm2(x))))
        if chosen.tokens is not None:
            x = x.masked_fill(~F.pad(chosen.tokens, (1, 0), value=True).unsqueeze(-1), 0.0)
        return x, chosen


class Sparsifiner(nn.Module, PyTorchModelHubMixin):
    """Images (B, in_chans, H, W) of one size to logits (B, num_classes).

    Patches, a class token and learned positions; blocks of `SparsifinerAttention`; the class token is classified.
    Trained in two stages from the weights of a dense model: after ``reconstruct()`` the predictors learn its attention
    (`sparsifiner_loss` with ``reconstruction``), after ``reconstruct(False)`` the rest is tuned under sparse attention.

    Args:
        img_size, patch_size: height and width, or one number for both.
        in_chans: channels of the image.
        num_classes: outputs; 0 for the class token's features.
        embed_dim, depth, num_heads, mlp_ratio: of the blocks.
        attn_keep_rate: of all layers, or of each; see `SparsifinerAttention`.
        token_keep_rate: share of the patches that each layer leaves, None where a layer prunes none. One number p
            leaves p, p², p³ after the layers at one, two and three quarters of the depth, as published.
        reduce_n, reduce_c, share_inout_proj: of the predictors.
        basis_threshold, coef_topk, coef_threshold: what of the predictors' low-rank attention is kept.
        score_threshold, prune_rows: further rules for the pairs, see `SparsifinerAttention`.
        qkv_bias, qk_scale: of the attention.
        representation_size: width of a layer with tanh before the classifier; None for no such layer.
        drop_rate: dropout of the embedded tokens, both branches and the hidden layer of the MLPs.
        drop_path_rate: of the last block; rises linearly from 0.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "sparsifiner-tiny": {"embed_dim": 192, "num_heads": 3},
        "sparsifiner-small": {"embed_dim": 384, "num_heads": 6},
        "sparsifiner-base": {"embed_dim": 768, "num_heads": 12},
    }

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        attn_keep_rate: float | Sequence[float] | None = 0.25,
        token_keep_rate: float | Sequence[float | None] | None = None,
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
        representation_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        image, patch = _pair("img_size", img_size), _pair("patch_size", patch_size)
        if not (0 < patch[0] <= image[0] and 0 < patch[1] <= image[1]):
            raise ArgumentError(f"patch_size: expected at most the image's {image}, got {patch}")
        attn_rates = _per_layer("attn_keep_rate", attn_keep_rate, depth)
        if isinstance(token_keep_rate, int | float):
            token_keep_rate = _pyramid(token_keep_rate, depth)
        token_rates = _per_layer("token_keep_rate", token_keep_rate, depth)
        self.image_shape = (in_chans, *image)
        self.num_tokens = (image[0] // patch[0]) * (image[1] // patch[1]) + 1
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch, patch)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.num_tokens, embed_dim), std=0.02))
        self.blocks = nn.ModuleList(
            SparsifinerBlock(
                SparsifinerAttention(
                    embed_dim,
                    num_heads,
                    self.num_tokens,
                    attn_rate,
                    token_rate,
                    reduce_n,
                    reduce_c,
                    share_inout_proj,
                    basis_threshold,
                    coef_topk,
                    coef_threshold,
                    score_threshold,
                    prune_rows,
                    qkv_bias,
                    qk_scale,
                ),
                mlp_ratio,
                drop_rate,
                drop_path,
            )
            for attn_rate, token_rate, drop_path in zip(
                attn_rates, token_rates, drop_path_rates(drop_path_rate, [depth])[0], strict=True
            )
        )
        self.drop = nn.Dropout(drop_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc = nn.Linear(embed_dim, representation_size) if representation_size else None
        self.head = nn.Linear(representation_size or embed_dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def reconstruct(self, mode: bool = True) -> "Sparsifiner":
        """First stage: only the predictors learn, under dense attention; or the second, in which all else does."""
        self.requires_grad_(not mode)
        for module in self.modules():
            if isinstance(module, SparsifinerAttention):
                module.reconstruct(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_details(images).logits

    def forward_details(self, images: Tensor) -> SparsifinerOutput:
        """The logits, features, and what each layer did."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ShapeError(f"images: expected (B, {expected}), got {tuple(images.shape)}")
        x = self.patch_embed(images).flatten(2).mT
        x = self.drop(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed)
        layers: list[Selection] = []
        for block in self.blocks:
            x, chosen = block(x, layers[-1].tokens if layers else None)
            layers.append(chosen)
        x = self.norm(x)
        first = x[:, 0] if self.fc is None else torch.tanh(self.fc(x[:, 0]))
        return SparsifinerOutput(self.head(first), x[:, 1:], tuple(layers))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "Sparsifiner":
        """Weights and arguments of the published ``Sparsifiner``; see `official_config` for its configuration."""
        kwargs = {"embed_dim": 768, "num_heads": 12, **official_kwargs}
        config, reconstructing = official_config(kwargs)
        attn_rates, token_rates = kwargs.pop("attn_keep_rate_list", 0.25), kwargs.pop("token_keep_rate_list", None)
        pruning = kwargs.pop("token_pruning_loc_indicator", None)
        if token_rates is not None and pruning is not None:
            token_rates = [rate if here else None for rate, here in zip(token_rates, pruning, strict=False)]
        config["attn_keep_rate"] = attn_rates if config["score_threshold"] is None else None
        config["token_keep_rate"] = token_rates
        if kwargs.get("hybrid_backbone") is not None:
            raise Unsupported("hybrid_backbone: only patches are embedded")
        names = ["img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio"]
        names += ["qkv_bias", "representation_size", "drop_rate", "drop_path_rate"]
        ignored = ["hybrid_backbone", "attn_drop_rate", "norm_layer", "distill"]
        model = cls(**config, **take(kwargs, names, ignored))
        state = without_shared_basis(state_dict, config["share_inout_proj"])
        load_strictly(model, state, {"patch_embed.proj": "patch_embed", "pre_logits.fc": "fc"})
        return model.reconstruct(True) if reconstructing else model


def sparsifiner_loss(
    student: SparsifinerOutput,
    labels: Tensor | None = None,
    teacher: SparsifinerOutput | None = None,
    *,
    classification: float = 1.0,
    distillation: float = 0.5,
    token_distillation: float = 0.5,
    reconstruction: float = 0.0,
    self_distillation: float = 0.0,
    criterion: Literal["mse", "kl", "ce"] = "mse",
) -> dict[str, Tensor]:
    """The weighted parts of the training loss, those of weight 0 left out; train on their sum.

    The published penalties on the number of kept pairs are not here: they act on the mask, which has no gradient.

    Args:
        student: from `Sparsifiner.forward_details`.
        labels: (B,) for ``classification``, cross entropy.
        teacher: of a dense model (``attn_keep_rate=1``) on the same images, for the next three; never gets gradients.
        distillation: KL of the logits to the teacher's, mean over the batch.
        token_distillation: mean squared error of the features, on the patches that are left.
        reconstruction: ``approx`` against the teacher's attention, mean over the layers; the first stage's loss (0.01).
        self_distillation: ``approx`` against the student's own dense attention, squared error summed.
        criterion: of reconstruction: squared error summed, KL (mean over the batch) or cross entropy as published.

    Raises:
        ArgumentError: something a part needs is missing, or the predictors are frozen where they should learn.
    """
    if criterion not in ("mse", "kl", "ce"):
        raise ArgumentError(f"criterion: expected mse, kl or ce, got {criterion!r}")
    parts: dict[str, Tensor] = {}
    if classification:
        if labels is None:
            raise ArgumentError("labels: classification needs them; give labels, or classification=0")
        parts["classification"] = classification * F.cross_entropy(student.logits, labels)
    if teacher is None and (distillation or token_distillation or reconstruction):
        raise ArgumentError("teacher: distillation and reconstruction need one; give a teacher, or weights of 0")
    frozen = not any(layer.connectivity.basis.requires_grad for layer in student.layers)
    if (reconstruction or self_distillation) and torch.is_grad_enabled() and frozen:
        raise ArgumentError("student: its predictors are frozen; call reconstruct() or requires_grad_() on them")
    approx = [layer.connectivity.approx for layer in student.layers]
    if teacher is not None and distillation:
        ours, theirs = (out.logits.log_softmax(-1) for out in (student, teacher))
        parts["distillation"] = distillation * F.kl_div(ours, theirs.detach(), reduction="batchmean", log_target=True)
    if teacher is not None and token_distillation:
        left = student.layers[-1].tokens
        features, wanted = student.features, teacher.features.detach()
        if left is not None:
            features, wanted = features[left], wanted[left]
        parts["token_distillation"] = token_distillation * F.mse_loss(features, wanted)
    if teacher is not None and reconstruction:
        seen = [layer.dense_weights()[:, :, 1:].detach() for layer in teacher.layers]
        losses = [_reconstruction(got, want, criterion) for got, want in zip(approx, seen, strict=True)]
        parts["reconstruction"] = reconstruction * torch.stack(losses).mean()
    if self_distillation:
        own = [layer.dense_weights()[:, :, 1:] for layer in student.layers]
        losses = [F.mse_loss(got, want, reduction="sum") for got, want in zip(approx, own, strict=True)]
        parts["self_distillation"] = self_distillation * torch.stack(losses).mean()
    return parts


def _reconstruction(got: Tensor, want: Tensor, criterion: str) -> Tensor:
    if criterion == "mse":
        return F.mse_loss(got, want, reduction="sum")
    if criterion == "kl":
        return F.kl_div(got.log_softmax(-1), want, reduction="batchmean")
    return F.cross_entropy(got, want)  # over heads, the second axis: so it was published


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ArgumentError(f"{name}: expected one number or two, got {value!r}")
    return pair[0], pair[1]


def _per_layer(name: str, value: float | Sequence[float | None] | None, depth: int) -> list[float | None]:
    if value is None or isinstance(value, int | float):
        return [value] * depth
    if len(value) != depth:
        raise ArgumentError(f"{name}: expected one for each of {depth} layers, got {len(value)}")
    return list(value)


def _pyramid(rate: float, depth: int) -> list[float | None]:
    rates: list[float | None] = [None] * depth
    for power in (1, 2, 3):
        rates[power * depth // 4] = rate**power
    return rates
