"""The paper's Titans as language models: memory as context, as gate, as layer, and the memory alone."""

from collections.abc import Mapping
from typing import Any

from regard.models.language.model import LanguageModel


class TitansMAC(LanguageModel):
    """Titans, memory as context (arXiv:2501.00663): a `LanguageModel` whose mixers are `MemoryAsContext` layers.

    Args:
        vocab_size, dim, depth, num_heads, hidden_dim: see `LanguageModel`.
        segment_len: tokens that attend to each other, and to what the memory recalls of all before.
        num_persistent: learned tokens that all see.
        rope_theta: base of the rotary angles.
        memory: arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        segment_len: int = 64,
        num_persistent: int = 4,
        hidden_dim: int | None = None,
        rope_theta: float = 10_000.0,
        memory: Mapping[str, Any] | None = None,
    ):
        config = {"segment_len": segment_len, "num_persistent": num_persistent, "memory": memory}
        mixers = ("titans/memory-as-context", config)
        super().__init__(vocab_size, dim, depth, mixers, num_heads, hidden_dim=hidden_dim, rope_theta=rope_theta)


class TitansMAG(LanguageModel):
    """Titans, memory as gate (arXiv:2501.00663): a `LanguageModel` whose mixers are `MemoryAsGate` layers.

    Args:
        vocab_size, dim, depth, num_heads, hidden_dim: see `LanguageModel`.
        window_size: attention sees the last so many tokens.
        num_persistent: learned tokens that all see.
        rope_theta: base of the rotary angles.
        memory: arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    mixer = "titans/memory-as-gate"

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        window_size: int = 64,
        num_persistent: int = 4,
        hidden_dim: int | None = None,
        rope_theta: float = 10_000.0,
        memory: Mapping[str, Any] | None = None,
    ):
        config = {"window_size": window_size, "num_persistent": num_persistent, "memory": memory}
        mixers = (self.mixer, config)
        super().__init__(vocab_size, dim, depth, mixers, num_heads, hidden_dim=hidden_dim, rope_theta=rope_theta)


class TitansMAL(TitansMAG):
    """Titans, memory as layer (arXiv:2501.00663): a `LanguageModel` whose mixers are `MemoryAsLayer` layers.

    Args:
        vocab_size, dim, depth, num_heads, hidden_dim: see `LanguageModel`.
        window_size: attention sees the last so many of the memory's outputs.
        num_persistent: learned tokens that all see.
        rope_theta: base of the rotary angles.
        memory: arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    mixer = "titans/memory-as-layer"


class TitansLMM(LanguageModel):
    """Titans' long-term memory alone (arXiv:2501.00663): a `LanguageModel` whose mixers are `NeuralMemory` layers.

    Args:
        vocab_size, dim, depth, hidden_dim: see `LanguageModel`.
        num_heads: memories side by side in each layer.
        memory: further arguments of `NeuralMemory`; ``chunk_size`` is 16 by default.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 1,
        hidden_dim: int | None = None,
        memory: Mapping[str, Any] | None = None,
    ):
        mixers = ("titans", {"chunk_size": 16, **(memory or {})})
        super().__init__(vocab_size, dim, depth, mixers, num_heads, hidden_dim=hidden_dim)
