"""MoH-DiT (arXiv:2410.11842): a class-conditional diffusion transformer whose attentions are mixtures of heads."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly, split_rows
from regard.layers.grid import Conv2d
from regard.mechanisms.heads.moh import MixtureOfHeadAttention

PerBlock = int | Sequence[int]
_FREQUENCIES = 256


class DiTBlock(nn.Module):
    """``x += g₁ attn(n₁ (1 + s₁) + b₁)``, ``x += g₂ MLP(n₂ (1 + s₂) + b₂)``: shifts b, scales s, gates g from c.

    n are LayerNorms without weights (adaLN-Zero, arXiv:2212.09748); x (B, N, C), c (B, C).
    """

    def __init__(self, attn: MixtureOfHeadAttention, mlp_ratio: float):
        super().__init__()
        dim = attn.dim
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attn, self.mlp = attn, MLP(dim, int(dim * mlp_ratio))
        self.mlp.act = nn.GELU(approximate="tanh")
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


def grid_sinusoids(dim: int, side: int) -> Tensor:
    """Positions (1, side², dim): sines and cosines of the column, then of the row, a quarter of dim each."""
    if dim % 4:
        raise ArgumentError(f"dim: expected a multiple of 4, got {dim}")
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], -1)
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)[None].float()


class MoHDiT(nn.Module, PyTorchModelHubMixin):
    """Noisy latents (B, in_chans, S, S), their times and classes to what the noise is predicted to be.

        c = MLP(sinusoids(t)) + E[y]        x = patches + positions,  blocks modulated by c,  Linear to pixels

    Every token of a block uses its shared heads and as many of the others as are routed; `moh_balance_loss` with a
    small coefficient is added to the loss. A freshly made network predicts zeros, as its gates and output are zero.

    Args:
        img_size: S, of the latents.
        in_chans: channels of the latents.
        patch_size: side of a patch.
        dim, depth: C and the number of blocks.
        num_heads, shared_heads, routed_heads: of all blocks, or of each; routed 0 where all heads are shared.
        head_dim: D; dim / num_heads by default.
        mlp_ratio: width of the MLPs.
        num_classes: number of classes.
        class_dropout: in training, how often the class is withheld; with 0 there is no class "none".
        learn_sigma: predict variances too, in as many more channels.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "moh-dit-xl-90": {
            "num_heads": (8,) * 9 + (16,) * 10 + (24,) * 9,
            "shared_heads": (8,) * 9 + (16,) * 19,
            "routed_heads": (0,) * 19 + (3,) * 9,
            "head_dim": 72,
        },
        "moh-dit-xl-75": {
            "num_heads": (8,) * 9 + (16,) * 10 + (24,) * 9,
            "shared_heads": (8,) * 9 + (10,) * 10 + (14,) * 9,
            "routed_heads": (0,) * 9 + (2,) * 19,
            "head_dim": 72,
        },
        "moh-dit-l-90": {
            "dim": 1024,
            "depth": 24,
            "num_heads": (8,) * 8 + (16,) * 8 + (24,) * 8,
            "shared_heads": (8,) * 8 + (16,) * 16,
            "routed_heads": (0,) * 16 + (3,) * 8,
            "head_dim": 64,
        },
        "moh-dit-l-75": {
            "dim": 1024,
            "depth": 24,
            "num_heads": (8,) * 8 + (16,) * 8 + (24,) * 8,
            "shared_heads": (8,) * 16 + (12,) * 8,
            "routed_heads": (0,) * 8 + (4,) * 16,
            "head_dim": 64,
        },
        "moh-dit-b-90": {
            "dim": 768,
            "depth": 12,
            "num_heads": 12,
            "shared_heads": (6,) * 5 + (7,) * 5 + (12,) * 2,
            "routed_heads": (4,) * 10 + (0,) * 2,
        },
        "moh-dit-b-75": {
            "dim": 768,
            "depth": 12,
            "num_heads": 12,
            "shared_heads": (4,) * 2 + (6,) * 8 + (12,) * 2,
            "routed_heads": (2,) * 2 + (3,) * 8 + (0,) * 2,
        },
        "moh-dit-s-90": {
            "dim": 384,
            "depth": 12,
            "num_heads": 6,
            "shared_heads": (3,) * 8 + (6,) * 4,
            "routed_heads": (2,) * 8 + (0,) * 4,
        },
        "moh-dit-s-75": {
            "dim": 384,
            "depth": 12,
            "num_heads": 6,
            "shared_heads": (2,) * 2 + (3,) * 8 + (6,) * 2,
            "routed_heads": (1,) * 6 + (2,) * 4 + (0,) * 2,
        },
    }
    positions: Tensor

    def __init__(
        self,
        img_size: int = 32,
        in_chans: int = 4,
        patch_size: int = 2,
        dim: int = 1152,
        depth: int = 28,
        num_heads: PerBlock = 16,
        shared_heads: PerBlock = 8,
        routed_heads: PerBlock = 6,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ArgumentError(f"img_size: expected a multiple of patch_size {patch_size}, got {img_size}")
        if not 0 <= class_dropout <= 1:
            raise ArgumentError(f"class_dropout: expected 0 to 1, got {class_dropout}")
        given = {"num_heads": num_heads, "shared_heads": shared_heads, "routed_heads": routed_heads}
        each = {name: [value] * depth if isinstance(value, int) else list(value) for name, value in given.items()}
        for name, values in each.items():
            if len(values) != depth:
                raise ArgumentError(f"{name}: expected one for each of {depth} blocks, got {len(values)}")
        self.img_size, self.in_chans, self.patch_size = img_size, in_chans, patch_size
        self.num_classes, self.class_dropout = num_classes, class_dropout
        self.out_chans = 2 * in_chans if learn_sigma else in_chans
        self.stem = Conv2d(in_chans, dim, patch_size, patch_size, padding=0)
        self.register_buffer("positions", grid_sinusoids(dim, img_size // patch_size))
        self.time = nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = nn.Embedding(num_classes + (class_dropout > 0), dim)
        self.blocks = nn.ModuleList(
            DiTBlock(
                MixtureOfHeadAttention(
                    dim,
                    heads,
                    head_dim=head_dim,
                    shared_heads=shared,
                    routed_heads=routed,
                    qkv_bias=True,
                    causal=False,
                ),
                mlp_ratio,
            )
            for heads, shared, routed in zip(*each.values(), strict=True)
        )
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, patch_size**2 * self.out_chans)
        self._init()

    def _init(self) -> None:
        zero = {self.head, self.modulation[1]}
        for module in self.modules():
            if isinstance(module, DiTBlock):
                zero.add(module.modulation[1])
            if isinstance(module, nn.Linear | Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in zero:
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.weight)
        for table in (self.classes, self.time[0], self.time[2]):
            assert isinstance(table, nn.Embedding | nn.Linear)
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, withheld: Tensor | None = None) -> Tensor:
        """Predict for noisy latents.

        Args:
            x: (B, in_chans, S, S).
            t: (B,) times, which may be fractions.
            y: (B,) classes; ``num_classes`` for none.
            withheld: (B,) bool, samples whose class is not told; in training they are drawn by default.

        Returns:
            (B, in_chans, S, S), the noise; with learn_sigma twice the channels.

        Raises:
            ShapeError: latents of another size, or another number of times and classes.
        """
        size = (self.in_chans, self.img_size, self.img_size)
        if x.dim() != 4 or x.shape[1:] != size:
            raise ShapeError(f"x: expected (B, {', '.join(map(str, size))}), got {tuple(x.shape)}")
        for name, given in (("t", t), ("y", y)):
            if given.shape != x.shape[:1]:
                raise ShapeError(f"{name}: expected {tuple(x.shape[:1])}, got {tuple(given.shape)}")
        if withheld is None and self.training and self.class_dropout:
            withheld = torch.rand(len(y), device=y.device) < self.class_dropout
        if withheld is not None:
            y = torch.where(withheld, self.num_classes, y)
        c = self.time(self._sinusoids(t)) + self.classes(y)
        tokens = self.stem(x.movedim(1, -1)).flatten(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, -1)
        pixels = self.head(self.norm(tokens) * (1 + scale) + shift)
        side, patch = self.img_size // self.patch_size, self.patch_size
        return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch, q=patch)

    def _sinusoids(self, t: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        angles = t[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.head.weight.dtype)

    def guided(self, x: Tensor, t: Tensor, y: Tensor, guidance: float, channels: int = 3) -> Tensor:
        """`forward` with classifier-free guidance: ``none + guidance (class - none)`` in the first channels.

        The authors, as those of DiT, guide three channels of four; the others are those of the class.

        Raises:
            Unsupported: trained without class_dropout, there is no prediction for no class.
        """
        if not self.class_dropout:
            raise Unsupported("guided: without class_dropout there is no class to guide away from")
        withheld = torch.arange(2 * len(y), device=y.device) >= len(y)
        told, untold = self(*(torch.cat([given, given]) for given in (x, t, y)), withheld=withheld).chunk(2)
        first = untold[:, :channels] + guidance * (told[:, :channels] - untold[:, :channels])
        return torch.cat([first, told[:, channels:]], 1)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: PerBlock = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        moh: bool = False,
        shared_head: Sequence[int] = (),
        routed_head: Sequence[int] = (),
        head_dim: int | Sequence[int | None] | None = None,
        **_: Any,
    ) -> "MoHDiT":
        """Weights and arguments of the published ``DiT`` with ``moh=True``."""
        if not moh:
            raise Unsupported("moh: expected True, without it the network is DiT")
        single = isinstance(num_heads, int)
        heads = [num_heads] * depth if isinstance(num_heads, int) else list(num_heads)
        dims = {None} if single else {head_dim} if isinstance(head_dim, int) else set(head_dim or (None,))
        if len(dims) > 1:
            raise Unsupported(f"head_dim: expected the same in all blocks, got {head_dim!r}")
        model = cls(
            input_size,
            in_channels,
            patch_size,
            hidden_size,
            depth,
            heads,
            [some if k else every for some, k, every in zip(shared_head, routed_head, heads, strict=True)],
            routed_head,
            dims.pop(),
            mlp_ratio,
            num_classes,
            class_dropout_prob,
            learn_sigma,
        )
        state, rename = (
            dict(state_dict),
            {
                "x_embedder.proj": "stem",
                "pos_embed": "positions",
                "t_embedder.mlp": "time",
                "y_embedder.embedding_table": "classes",
                "final_layer.linear": "head",
                "final_layer.adaLN_modulation": "modulation",
            },
        )
        for i in range(depth):
            attn = f"blocks.{i}.attn"
            split_rows(state, f"{attn}.qkv", (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"))
            rename |= {f"{attn}.proj": f"{attn}.o_proj", f"blocks.{i}.adaLN_modulation": f"blocks.{i}.modulation"}
        load_strictly(model, state, rename)
        return model
