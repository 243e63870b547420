"""RCMHA's language model: Transformer-XL, which reads a text in segments and remembers the last ones."""

from collections.abc import Mapping, Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, load_strictly
from regard.mechanisms.heads.relative_conv import RelativeConvAttention, official_names


class RCMHABlock(nn.Module):
    """``x + attn(norm(x), memory=norm(memory))``, then ``x + mlp(norm(x))``."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, kernel_size: int, max_length: int):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), RelativeConvAttention(dim, num_heads, kernel_size, max_length)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, hidden_dim, act=nn.ReLU)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x), memory=self.norm1(memory))
        return x + self.mlp(self.norm2(x))


class RCMHALanguageModel(nn.Module, PyTorchModelHubMixin):
    """RCMHA's decoder (arXiv:2308.03429), which reads a text segment by segment.

        memory = None
        for segment in ids.split(128, dim=1):
            logits, memory = model(segment, memory)

    Every layer also sees its own inputs at the last ``mem_len`` tokens before the segment, without a gradient; so what
    is known of the past grows with every layer. Queries at the beginning of a segment do not see the memory in their
    convolution, as published.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim, depth, num_heads: of the model.
        hidden_dim: of the feed-forward layers.
        mem_len: tokens to remember.
        kernel_size: taps of the convolutions.
        max_length: longest memory and segment together.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 6,
        num_heads: int = 8,
        hidden_dim: int = 256,
        mem_len: int = 128,
        kernel_size: int = 3,
        max_length: int = 4096,
    ):
        super().__init__()
        if not 0 <= mem_len < max_length:
            raise ArgumentError(f"mem_len: expected 0 or more and less than max_length {max_length}, got {mem_len}")
        self.mem_len = mem_len
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            RCMHABlock(dim, num_heads, hidden_dim, kernel_size, max_length) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, ids: Tensor, memory: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of the next token at every position, and the memory for the next segment.

        Args:
            ids: (B, N) integers.
            memory: from the segment before; None at the beginning of a text.

        Returns:
            (B, N, vocab_size), and the inputs of each layer at the last tokens (B, ≤ mem_len, C).
        """
        if ids.dim() != 2 or ids.is_floating_point():
            raise ShapeError(f"ids: expected integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        x = self.embedding(ids)
        if memory is None:
            memory = [x[:, :0].detach()] * len(self.blocks)
        after = []
        for block, before in zip(self.blocks, memory, strict=True):
            both = torch.cat([before, x.detach()], 1)
            after.append(both[:, max(0, both.shape[1] - self.mem_len) :])
            x = block(x, before)
        return self.head(self.norm(x)), tuple(after)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], *, mem_len: int = 128) -> "RCMHALanguageModel":
        """Weights of ``AutoregressiveModel``, whose sizes are those of its weights."""
        layer = "transformer.layers.0"
        depth = len({name.split(".")[2] for name in state_dict if name.startswith("transformer.layers.")})
        rows, heads = state_dict[f"{layer}.self_attn.key_pos_bias"].shape
        vocab_size, dim = state_dict["src_embed.weight"].shape
        model = cls(
            vocab_size,
            dim,
            depth,
            num_heads=heads,
            hidden_dim=len(state_dict[f"{layer}.feed_forward.layer1.weight"]),
            mem_len=mem_len,
            kernel_size=state_dict[f"{layer}.self_attn.query.1.conv.weight"].shape[-1],
            max_length=rows // 2,
        )
        names = {"src_embed": "embedding", "transformer.norm": "norm", "generator": "head"}
        for i in range(depth):
            old, own = f"transformer.layers.{i}", f"blocks.{i}"
            names |= {f"{old}.self_attn.{a}": f"{own}.mixer.{b}" for a, b in official_names().items()}
            names |= {f"{old}.norm_self_attn": f"{own}.norm1", f"{old}.norm_ff": f"{own}.norm2"}
            names |= {f"{old}.feed_forward.layer{n}": f"{own}.mlp.fc{n}" for n in (1, 2)}
        load_strictly(model, state_dict, names)
        return model
