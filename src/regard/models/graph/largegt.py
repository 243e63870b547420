"""LargeGT, a transformer for the nodes of one huge graph (arXiv:2312.11109)."""

from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.graph.codebook import CodebookAttention

NORMS = {"batch_norm": nn.BatchNorm1d, "layer_norm": nn.LayerNorm, "none": None}
#: published weights that nothing reads
UNUSED = ("lin_key", "lin_query", "lin_value", "lin_skip", "local_module.out_proj")


class LocalModule(nn.Module):
    """Attention among the sampled tokens of a node, read out at the node: (B, L, dim) to (B, H·D).

        t = We s          z = LN(Wr t + Wo MHA(LN t))          H heads, each as wide as the input, D = dim
        y = z_0 + Σ_{u>0} softmax_u(w [z_0, z_u]) z_u

    Args:
        dim: of the tokens and of each head.
        num_heads: H.
        dropout: after attention and before the last norm.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.3):
        super().__init__()
        per_head(dim, num_heads, dim)
        self.dim, self.num_heads, wide = dim, num_heads, num_heads * dim
        self.embed = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.res_proj = (nn.Linear(dim, wide) for _ in range(4))
        self.o_proj = nn.Linear(wide, wide)
        self.dropout = nn.Dropout(dropout)
        self.final_norm = nn.LayerNorm(wide)
        self.gate = nn.Linear(2 * wide, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, seq: Tensor) -> Tensor:
        if seq.dim() != 3 or seq.shape[1] < 2 or seq.shape[2] != self.dim:
            raise ShapeError(f"seq: expected (B, L, {self.dim}) with L of 2 or more, got {tuple(seq.shape)}")
        t = self.embed(seq)
        h = self.norm(t)
        q, k, v = (split_heads(proj(h), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = self.o_proj(merge_heads(attention(q, k, v)))
        z = self.final_norm(self.dropout(self.res_proj(t) + self.dropout(y)))
        node, others = z[:, :1], z[:, 1:]
        weights = self.gate(torch.cat([node.expand_as(others), others], -1)).softmax(1)
        return node[:, 0] + (weights * others).sum(1)


class LargeGT(nn.Module, PyTorchModelHubMixin):
    """Classifies nodes from sampled tokens (`LargeGTSampler`, `LocalModule`) and a codebook (`CodebookAttention`).

        y = W FF([local(E_s s), global(E_x x, p)])

    The tokens come from `regard.models.graph.sampler.LargeGTSampler`. One layer, without edge features. Cost per node
    O(K² d H + M d H), whatever the size of the graph, but for counting the nodes of each vector of the codebook.

    Args:
        num_nodes: of the graph.
        in_channels, hidden_channels, out_channels: of the features, d, and the classes.
        global_dim: of the positions.
        num_heads: H, each head of width d.
        num_centroids: M, the codebook's vectors.
        sample_node_len: K, sampled nodes per sequence; each gives three tokens.
        conv_type: "full", or only the "local" or the "global" half.
        norm_type: "batch_norm", "layer_norm" or "none" in the feed-forward layers.
        ff_dropout, attn_dropout: of the feed-forward layers and of the attention to the codebook.
    """

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        global_dim: int = 64,
        num_heads: int = 2,
        num_centroids: int = 4096,
        sample_node_len: int = 100,
        conv_type: Literal["full", "local", "global"] = "full",
        norm_type: Literal["batch_norm", "layer_norm", "none"] = "batch_norm",
        ff_dropout: float = 0.5,
        attn_dropout: float = 0.0,
    ):
        super().__init__()
        if conv_type not in ("full", "local", "global"):
            raise ArgumentError(f"conv_type: expected full, local or global, got {conv_type!r}")
        if norm_type not in NORMS:
            raise ArgumentError(f"norm_type: expected {', '.join(NORMS)}, got {norm_type!r}")
        if sample_node_len < 1:
            raise ArgumentError(f"sample_node_len: expected at least 1, got {sample_node_len}")
        self.in_channels, self.sample_node_len, self.conv_type = in_channels, sample_node_len, conv_type
        dim, wide, norm = hidden_channels, num_heads * hidden_channels, NORMS[norm_type]
        self.fc_in_seq = self.fc_in = self.local_module = self.global_module = None
        if conv_type != "global":
            self.fc_in_seq = nn.Sequential(*_layer(in_channels, dim, None, ff_dropout), nn.Linear(dim, dim))
            self.local_module = LocalModule(dim, num_heads)
        if conv_type != "local":
            self.fc_in = nn.Sequential(*_layer(in_channels, dim, norm, ff_dropout), nn.Linear(dim, dim))
            self.global_module = CodebookAttention(
                dim, num_heads, dim, global_dim, num_nodes, num_centroids, dropout=attn_dropout
            )
        both = wide * (2 if conv_type == "full" else 1)
        self.ff = nn.Sequential(*_layer(both, wide, norm, ff_dropout), *_layer(wide, dim, norm, ff_dropout))
        self.fc_out = nn.Linear(dim, out_channels)

    def forward(
        self,
        seq: Tensor | None = None,
        x: Tensor | None = None,
        pos_enc: Tensor | None = None,
        batch_idx: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, out_channels).

        Args:
            seq: (B, 3K, in_channels), for the local half.
            x, pos_enc: (B, in_channels) and (B, global_dim), for the global half.
            batch_idx: (B,) which nodes these are, for the global half in training mode.
        """
        return self.fc_out(self.ff(torch.cat(self.branches(seq, x, pos_enc, batch_idx), 1)))

    def branches(
        self, seq: Tensor | None, x: Tensor | None, pos_enc: Tensor | None, batch_idx: Tensor | None = None
    ) -> list[Tensor]:
        """What the local and the global half give, (B, H·d) each; only the halves there are."""
        k, channels = self.sample_node_len, self.in_channels
        if self.local_module is not None and (seq is None or seq.dim() != 3 or seq.shape[1:] != (3 * k, channels)):
            raise ShapeError(f"seq: expected (B, {3 * k}, {channels}), got {None if seq is None else tuple(seq.shape)}")
        if self.global_module is not None and (x is None or x.dim() != 2 or x.shape[1] != channels):
            raise ShapeError(f"x: expected (B, {channels}), got {None if x is None else tuple(x.shape)}")
        if self.global_module is not None and pos_enc is None:
            raise ShapeError("pos_enc: expected (B, global_dim), got None")
        found = []
        if self.local_module is not None and self.fc_in_seq is not None:
            found.append(self.local_module(self.fc_in_seq(seq)))
        if self.global_module is not None and self.fc_in is not None:
            found.append(self.global_module(self.fc_in(x), pos_enc, batch_idx))
        return found

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "LargeGT":
        """Weights and arguments of the published ``LargeGT``; weights that it never reads are passed over."""
        kwargs = {**official_kwargs}
        if (layers := kwargs.pop("num_layers", 1)) != 1:
            raise Unsupported(f"num_layers: published code has one layer, got {layers}")
        kwargs.pop("skip", None)  # of the layer's own projections, which are unused
        kwargs["num_heads"] = kwargs.pop("heads")
        if kwargs.pop("no_bn", False):
            kwargs["norm_type"] = "none"
        model = cls(**kwargs)
        layer, encoder = "convs.0.", "convs.0.local_module.layers.0."
        rename = {
            f"{layer}local_module.att_embeddings_nope": "local_module.embed",
            f"{layer}local_module.attn_layer": "local_module.gate",
            f"{layer}local_module.final_ln": "local_module.final_norm",
            f"{encoder}res_proj": "local_module.res_proj",
            f"{encoder}self_attention_norm": "local_module.norm",
            f"{encoder}self_attention.output_layer": "local_module.o_proj",
            f"{layer}lin_proj_g": "global_module.g_proj",
            f"{layer}lin_query_g": "global_module.q_proj",
            f"{layer}lin_key_g": "global_module.k_proj",
            f"{layer}lin_value_g": "global_module.v_proj",
            f"{layer}c_idx": "global_module.assignment",
            f"{layer}vq._embedding": "global_module.codebook.embedding",
            f"{layer}vq._embedding_output": "global_module.codebook.centroids",
            f"{layer}vq._ema_w": "global_module.codebook.embedding_sum",
            f"{layer}vq._ema_cluster_size": "global_module.codebook.cluster_size",
            f"{layer}vq.bn": "global_module.codebook.bn",
            "ffs.0": "ff",
        }
        rename |= {f"{encoder}self_attention.linear_{n}": f"local_module.{n}_proj" for n in "qkv"}
        unused = tuple(f"{layer}{name}." for name in UNUSED)
        if model.local_module is None:
            unused += ("fc_in_seq.", f"{layer}local_module.")
        if model.global_module is None:
            unused += ("fc_in.",)
        load_strictly(model, {name: t for name, t in state_dict.items() if not name.startswith(unused)}, rename)
        return model


def _layer(dim_in: int, dim_out: int, norm: type[nn.Module] | None, dropout: float) -> list[nn.Module]:
    normed = [] if norm is None else [norm(dim_out)]
    return [nn.Linear(dim_in, dim_out), *normed, nn.ReLU(), nn.Dropout(dropout)]
