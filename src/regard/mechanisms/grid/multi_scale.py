"""DuoFormer: every patch of an image is a short sequence of tokens from all stages of a CNN."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly, split_rows
from regard.layers.scale import LayerScale
from regard.mechanisms.softmax import SoftmaxAttention

Order = Literal["official", "rows"]


def patch_tokens(feature: Tensor, grid: tuple[int, int], order: Order = "official") -> Tensor:
    """The pixels of each patch: (B, f·h, f·w, C) on a grid of h × w patches to (B, h·w, f², C).

    They are in rows, but in columns for f = 2 in the ``official`` order, as the published tables have them.

    Raises:
        ShapeError: the image is no whole number of square patches.
    """
    if order not in ("official", "rows"):
        raise ArgumentError(f"order: expected 'official' or 'rows', got {order!r}")
    if feature.dim() != 4:
        raise ShapeError(f"feature: expected (B, H, W, C), got {tuple(feature.shape)}")
    (height, width), (h, w) = feature.shape[1:3], grid
    f = height // h
    if f < 1 or (height, width) != (f * h, f * w):
        raise ShapeError(f"feature: expected the same multiple of {h} x {w} (grid) each way, got {height} x {width}")
    inside = "(q p)" if f == 2 and order == "official" else "(p q)"
    return rearrange(feature, f"b (h p) (w q) c -> b (h w) {inside} c", p=f, q=f)


def multi_scale_tokens(features: Sequence[Tensor], grid: tuple[int, int], order: Order = "official") -> Tensor:
    """All stages' tokens of each patch, the coarsest stage first: (B, h·w, S, C).

    ``features``: maps (B, f·h, f·w, C), the finest first, as backbones give them; f may be any number, but that of
    the next map must be smaller. With f = 4, 2, 1 there are S = 21 tokens in a patch.

    Raises:
        ShapeError: a map does not fit the grid, or they are not in order.
    """
    sides = [feature.shape[1] for feature in features]
    if not sides or any(a <= b for a, b in pairwise(sides)):
        raise ShapeError(f"features: expected one map or more, the finest first, got heights {sides}")
    return torch.cat([patch_tokens(feature, grid, order) for feature in reversed(features)], 2)


def tokens_per_patch(scales: int) -> int:
    """S: tokens that the last ``scales`` stages have in a patch, each stage twice as fine as the next: 1, 5, 21, 85."""
    if scales < 1:
        raise ArgumentError(f"scales: expected at least 1, got {scales}")
    return sum(4**i for i in range(scales))


class PatchAttention(SoftmaxAttention):
    """`SoftmaxAttention` without positions, noncausal; the output projection always has a bias."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__(dim, num_heads, bias=qkv_bias, causal=False)
        if not qkv_bias:
            self.o_proj = nn.Linear(dim, dim)


class ScaleBlock(nn.Module):
    """``x + γ1 attention(LN x)``, then ``x + γ2 MLP(LN x)``; (B, N, C) to the same.

    Scale attention is this block with a patch for a batch item: N = 1 + S tokens in each of B·P patches.

    Args:
        dim, num_heads: C and H.
        mlp_ratio: width of the MLP over C.
        qkv_bias: of queries, keys and values.
        init_values: initial γ, None for no scales.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = PatchAttention(dim, num_heads, qkv_bias)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (nn.Identity() if init_values is None else LayerScale(dim, init_values) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DuoFormerHead(nn.Module, PyTorchModelHubMixin):
    """Attention inside patches across scales, then across patches (DuoFormer, arXiv:2506.12982).

        X += E_scale;   depth times   X_p += γ1 MHSA(LN X_p),   X_p += γ2 MLP(LN X_p)       for each patch p
        Z = [class token, X_1[0], …, X_P[0]] + E;   depth times   Z = MHSA(Z)
        logits = W Z[0]

    tokens (B, P, 1 + S, C) to logits (B, num_classes): P patches, each with a scale token, which gathers the others,
    and S tokens from the stages of a CNN (`multi_scale_tokens`). The two attentions together are a factorisation of
    attention between all P·S tokens, each exact, noncausal. Cost of the scores O(P S² C + P² C) against O(P² S² C).

    The second attention has neither residuals nor norms nor MLPs, as in the published code; with
    ``patch_block="transformer"`` it is made of the same blocks as the first. That code also computes a norm of the
    class token and then classifies the token without it; ``final_norm`` uses it.

    Args:
        dim: C.
        depth: how many layers each of the two attentions has.
        num_heads: H.
        scales: stages used, the coarsest with 1 token per patch, the others with 4 times as many as the one before.
        num_patches: P.
        mlp_ratio: width of the MLPs over C.
        init_values: initial γ, None for no scales.
        num_classes: outputs; 0 for the class token.
        qkv_bias: of queries, keys and values.
        num_tokens: 1 + S, where the stages are not twice as fine as each other; else it follows from ``scales``.
        patch_block: "plain" or "transformer", see above.
        final_norm: LayerNorm before the classifier.
    """

    cost: ClassVar[str] = "O((P S² + P²) C), P patches of S tokens"

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        scales: int = 4,
        num_patches: int = 49,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        num_tokens: int | None = None,
        patch_block: Literal["plain", "transformer"] = "plain",
        final_norm: bool = False,
    ):
        super().__init__()
        count = 1 + tokens_per_patch(scales) if num_tokens is None else num_tokens
        for name, value in (("depth", depth), ("num_patches", num_patches), ("num_tokens", count)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if patch_block not in ("plain", "transformer"):
            raise ArgumentError(f"patch_block: expected 'plain' or 'transformer', got {patch_block!r}")
        self.dim, self.num_patches, self.num_tokens = dim, num_patches, count
        self.pos_embed_for_scale = nn.Parameter(torch.empty(1, 1, count, dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + 1, dim))
        block = (dim, num_heads, mlp_ratio, qkv_bias, init_values)
        self.scale_blocks = nn.Sequential(*(ScaleBlock(*block) for _ in range(depth)))
        self.patch_blocks = nn.Sequential(
            *(
                PatchAttention(dim, num_heads, qkv_bias) if patch_block == "plain" else ScaleBlock(*block)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for table in (self.pos_embed_for_scale, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.036)
        nn.init.normal_(self.cls_token, std=0.036)
        for layer in (*self.scale_blocks.modules(), *self.patch_blocks.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        expected = (self.num_patches, self.num_tokens, self.dim)
        if tokens.dim() != 4 or tuple(tokens.shape[1:]) != expected:
            raise ShapeError(f"tokens: expected (B, {', '.join(map(str, expected))}), got {tuple(tokens.shape)}")
        x = self.scale_blocks((tokens + self.pos_embed_for_scale).flatten(0, 1)).view(tokens.shape)
        z = torch.cat([self.cls_token.expand(len(x), -1, -1), x[:, :, 0]], 1) + self.pos_embed
        return self.head(self.norm(self.patch_blocks(z)[:, 0]))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        depth: int = 12,
        scales: int = 2,
        num_heads: int = 12,
        embed_dim: int = 768,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        num_classes: int = 100,
        num_patches: int = 49,
        final_norm: bool = False,
        **others: Any,
    ) -> "DuoFormerHead":
        """Weights and arguments of the published ``MultiscaleFormer``.

        The number of tokens is that of the weights: the published class expects 20 with ``scales=2``, of three stages
        but for the scale token.

        Raises:
            Unsupported: dropout or other layers, which the published class hands on wrongly.
        """
        if unknown := [f"{name}={value!r}" for name, value in others.items() if value]:
            raise Unsupported(f"{', '.join(unknown)}: DuoFormer is known without dropout and with its own layers only")
        table = state_dict.get("pos_embed_for_scale")
        module = cls(
            embed_dim,
            depth,
            num_heads,
            scales,
            num_patches,
            mlp_ratio,
            init_values or None,
            num_classes,
            qkv_bias,
            None if table is None else table.shape[2],
            final_norm=final_norm,
        )
        load_strictly(module, own_names(state_dict, final_norm))
        return module


def own_names(state: dict[str, Tensor], final_norm: bool = False) -> dict[str, Tensor]:
    """Published weights of the head under our names; those of a norm whose output nothing reads are left out."""
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "fc_norm" and not final_norm:
            continue
        if part == "blocks":
            part, rest = "patch_blocks", rest.replace(".attn", "", 1)
        part = {"scaleBlocks": "scale_blocks", "fc_norm": "norm"}.get(part, part)
        own[f"{part}.{rest}" if rest else part] = tensor
    fused = {name.rpartition(".")[0] for name in own if ".qkv." in name}
    for name in fused:
        before = name.removesuffix("qkv")
        split_rows(own, name, tuple(f"{before}{part}_proj" for part in "qkv"))
    return {name.replace(".proj.", ".o_proj."): tensor for name, tensor in own.items()}
