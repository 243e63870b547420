"""TransNormerLLM: a language model of lightning attention and gated linear units (arXiv:2307.14995)."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ShapeError, Unsupported
from regard.layers import load_strictly
from regard.mechanisms.linear.lightning import LightningAttention


class GatedLinearUnit(nn.Module):
    """``W3 ((W1 x) ∘ (W2 x))``, no activation."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False):
        super().__init__()
        self.l1, self.l2 = nn.Linear(dim, hidden_dim, bias=bias), nn.Linear(dim, hidden_dim, bias=bias)
        self.l3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerLLM(nn.Module, PyTorchModelHubMixin):
    """Token ids (B, N) to logits (B, N, vocab_size).

    Args:
        vocab_size, dim, depth, num_heads, glu_dim: sizes.
        relative_layers: layers with learned relative positions; the first by default.
        scale_embedding: multiply embeddings by √dim.
        head_dim: dim / num_heads by default.
        activation: of queries and keys.
    """

    def __init__(
        self,
        vocab_size: int = 64_000,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 8,
        glu_dim: int = 2816,
        relative_layers: Sequence[int] = (0,),
        scale_embedding: bool = True,
        head_dim: int | None = None,
        activation: str = "silu",
    ):
        super().__init__()
        self.scale = dim**0.5 if scale_embedding else 1.0
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mixers = nn.ModuleList(
            LightningAttention(
                dim,
                num_heads,
                head_dim,
                layer_idx=layer,
                num_layers=depth,
                gate="linear",
                norm="simple",
                activation=activation,
                activate_values=False,
                relative=layer in relative_layers,
            )
            for layer in range(depth)
        )
        self.mlps = nn.ModuleList(GatedLinearUnit(dim, glu_dim) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        if ids.dim() != 2:
            raise ShapeError(f"ids: expected (B, N), got {tuple(ids.shape)}")
        x = self.embedding(ids) * self.scale
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(self.norm(x), valid=valid)
            x = x + mlp(self.norm(x))
        return self.head(self.norm(x))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "TransNormerLLM":
        """The released ``TransnormerForCausalLM`` with ``norm_type="simplermsnorm"`` and without biases."""
        if (norm := official_kwargs.get("norm_type", "simplermsnorm")) != "simplermsnorm":
            raise Unsupported(f"norm_type: only simplermsnorm is known, got {norm!r}")
        depth, heads = official_kwargs["decoder_layers"], official_kwargs["decoder_attention_heads"]
        inner = official_kwargs.get("hidden_dim", official_kwargs["decoder_embed_dim"])
        model = cls(
            official_kwargs["vocab_size"],
            official_kwargs["decoder_embed_dim"],
            depth,
            heads,
            official_kwargs["glu_dim"],
            [i for i, used in enumerate(official_kwargs["linear_use_lrpe_list"]) if used],
            not official_kwargs.get("no_scale_embedding", False),
            inner // heads,
            official_kwargs.get("linear_act_fun", "silu"),
        )
        state = dict(state_dict)
        names = {"model.embed_tokens": "embedding", "lm_head": "head"}
        for layer in range(depth):
            old, new = f"model.layers.{layer}", f"mixers.{layer}"
            fused = state.pop(f"{old}.token_mixer.qkvu_proj.weight")
            parts = zip(("q_proj", "k_proj", "v_proj", "gate_proj"), fused.chunk(4), strict=True)
            state |= {f"{new}.{name}.weight": part for name, part in parts}
            names |= {f"{old}.token_mixer.out_proj": f"{new}.o_proj", f"{old}.channel_mixer": f"mlps.{layer}"}
            names[f"{old}.token_mixer.lrpe.theta"] = f"{new}.theta"
        load_strictly(model, state, names)
        return model
