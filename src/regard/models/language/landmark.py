"""LandmarkGPT: a GPT with landmark attention (arXiv:2305.16300)."""

from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import MLP, load_strictly
from regard.mechanisms.sparse.landmark import Blocks, LandmarkAttention, insert_landmarks, official_arguments


class RecallState(NamedTuple):
    """What `LandmarkGPT.recall` carries.

    Attributes:
        layers: blocks of every layer.
        length: tokens seen, without landmarks.
    """

    layers: tuple[Blocks, ...]
    length: int


class LandmarkBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, mixer: LandmarkAttention, bias: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(mixer.dim, bias=bias) for _ in range(2))
        self.mixer, self.mlp = mixer, MLP(mixer.dim, bias=bias)

    def forward(self, x: Tensor, is_landmark: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        x = x + self.mixer(self.norm1(x), valid=valid, is_landmark=is_landmark)
        return x + self.mlp(self.norm2(x))

    def recall(self, x: Tensor, state: Blocks | None) -> tuple[Tensor, Blocks]:
        mixed, state = self.mixer.recall(self.norm1(x), state)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), state


class LandmarkGPT(nn.Module, PyTorchModelHubMixin):
    """Token ids (B, N), landmarks among them, to logits (B, N, vocab_size).

        logits = model(insert_landmarks(ids, model.block_size, model.landmark_id))      # training
        logits, state = model.recall(ids, state)                                        # any length, chunk by chunk

    Args:
        vocab_size: with the landmark.
        landmark_id: by default the last id.
        dim, depth, num_heads: sizes; embeddings are tied.
        block_size, top_k, capacity, selection, rope_theta: see `LandmarkAttention`.
        bias: of norms and linear layers.
    """

    def __init__(
        self,
        vocab_size: int = 50_304,
        dim: int = 1024,
        depth: int = 12,
        num_heads: int = 8,
        block_size: int = 50,
        landmark_id: int | None = None,
        top_k: int = 5,
        capacity: int = 1024,
        selection: str = "token_head",
        rope_theta: float | None = 10_000.0,
        bias: bool = False,
    ):
        super().__init__()
        self.landmark_id = vocab_size - 1 if landmark_id is None else landmark_id
        if not 0 <= self.landmark_id < vocab_size:
            raise ArgumentError(f"landmark_id: expected 0 to {vocab_size - 1}, got {landmark_id}")
        self.block_size = block_size
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            LandmarkBlock(
                LandmarkAttention(dim, num_heads, None, None, block_size, top_k, capacity, selection, rope_theta, bias),
                bias,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what adds to the residual stream begins smaller
                adds = name.endswith(("o_proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if adds else 0.02)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        is_landmark = self._check(ids) == self.landmark_id
        place = torch.arange(ids.shape[1], device=ids.device) % (self.block_size + 1)
        regular = bool((is_landmark == (place == self.block_size)).all())
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, None if regular else is_landmark, valid)
        return self.head(self.norm(x))

    def recall(self, ids: Tensor, state: RecallState | None = None) -> tuple[Tensor, RecallState]:
        """Logits of the next n tokens (B, n), which come without landmarks, and the state to continue from.

        Every layer finds its own blocks in what came before, see `LandmarkAttention.recall`. How a text is cut into
        chunks matters: tokens of a chunk all see each other's blocks, and choose among those of the chunks before.
        """
        length = 0 if state is None else state.length
        rest = length % self.block_size
        x = self.embedding(insert_landmarks(self._check(ids), self.block_size, self.landmark_id, rest))
        states = []
        for block, before in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            assert isinstance(block, LandmarkBlock)
            x, after = block.recall(x, before)
            states.append(after)
        own = torch.arange(ids.shape[1], device=ids.device)
        x = x[:, own + (rest + own) // self.block_size]
        return self.head(self.norm(x)), RecallState(tuple(states), length + ids.shape[1])

    def _check(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"ids: expected integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        return ids

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "LandmarkGPT":
        """``GPTBase`` of lm_benchmark; the arguments of its cache may stand under ``cache``."""
        arguments, depth = official_arguments(official_kwargs), official_kwargs["n_layer"]
        model = cls(official_kwargs["vocab_size"], depth=depth, landmark_id=official_kwargs["landmark_id"], **arguments)
        state = {name: t for name, t in state_dict.items() if not name.endswith((".attn.bias", ".wpe.freqs"))}
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        names = {"transformer.wte": "embedding", "transformer.ln_f": "norm", "lm_head": "head"}
        for layer in range(depth):
            old, new = f"transformer.h.{layer}", f"blocks.{layer}"
            names |= {f"{old}.ln_{i}": f"{new}.norm{i}" for i in (1, 2)}
            names |= {f"{old}.mlp.c_fc": f"{new}.mlp.fc1", f"{old}.mlp.c_proj": f"{new}.mlp.fc2"}
            own = {name: state.pop(name) for name in list(state) if name.startswith(f"{old}.attn.")}
            own = {name.removeprefix(f"{old}.attn."): tensor for name, tensor in own.items()}
            mixer = LandmarkAttention.from_official(own, **official_kwargs)
            state |= {f"{new}.mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
        load_strictly(model, state, names)
        return model
