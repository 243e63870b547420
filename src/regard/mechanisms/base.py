"""`Mechanism`, what every token mixer for sequences promises."""

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regard import masks
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.masks import Mask

Pattern = Literal["self", "causal-self", "cross", "causal-cross"]


class Mechanism(nn.Module, PyTorchModelHubMixin):
    """Mixes tokens: (B, N, C) to (B, N, C), from the tokens themselves or from a context (B, M, C).

    A subclass overrides `forward`, and `stream` if it can work token by token. Both give the same outputs. It says in
    ``patterns`` how it may legitimately be used; where both causal and noncausal use are, ``causal`` is an argument.

    Attributes:
        patterns: the uses that are legitimate.
        cost: of `forward`, in terms of N, C and its own arguments.
        state: what streaming carries along: None (cannot stream), "constant" or "growing" with the tokens seen.
        causal: whether output t depends on tokens 0..t only.
        example, example_length: what the example of the documentation page needs beside ``dim`` and ``num_heads``.
    """

    patterns: ClassVar[frozenset[Pattern]]
    cost: ClassVar[str]
    state: ClassVar[Literal["constant", "growing"] | None] = None
    causal: bool
    example: ClassVar[dict[str, Any]] = {}
    example_length: ClassVar[int] = 100

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        """The parallel form.

        Args:
            x: (B, N, C).
            context: (B, M, C) to attend to; x itself by default.
            valid: (B, N) bool, of the context (B, M) where there is one; False marks padding, which no token sees.
                Outputs at padding are meaningless but finite.

        Raises:
            Unsupported: a context is given to a mechanism that is not for cross-attention.
        """
        raise NotImplementedError

    def stream(self, x: Tensor, state: Any = None, *, valid: Tensor | None = None) -> tuple[Tensor, Any]:
        """The next n tokens of a sequence, any n ≥ 1, and the state with which the ones after them continue.

        Args:
            x: (B, n, C).
            state: from the call before; None at the beginning. A pytree whose tensors have the batch first, so that
                beams are reordered and bytes are counted without knowing the mechanism (`state_bytes`).
            valid: (B, n) bool, False marks padding.

        Raises:
            Unsupported: the mechanism is noncausal or has no streaming form.
        """
        raise Unsupported(f"{type(self).__name__} cannot stream")

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> Self:
        """The module with the weights of the published code, built from that code's own constructor arguments.

        Raises:
            Unsupported: no published code is known.
            ArgumentError: weights are missing, left over or of other shapes.
        """
        raise Unsupported(f"{cls.__name__}: there is no published code whose weights could be loaded")

    def _check(
        self,
        x: Tensor,
        context: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        dim: int | None = None,
        streaming: bool = False,
    ) -> None:
        """Refuse what this mechanism cannot do, before anything is computed."""
        name = type(self).__name__
        if x.dim() != 3 or (dim is not None and x.shape[-1] != dim):
            raise ShapeError(f"x: expected (B, N, {'C' if dim is None else dim}), got {tuple(x.shape)}")
        if streaming and not self.causal:
            raise Unsupported(f"{name} was built with causal=False; streaming needs causal=True")
        if context is not None:
            if not self.patterns & {"cross", "causal-cross"}:
                raise Unsupported(f"{name} mixes the tokens of one sequence and takes no context")
            if self.causal and "causal-cross" not in self.patterns:
                raise Unsupported(f"{name} with causal=True takes no context; build it with causal=False")
            if context.dim() != 3 or context.shape[0] != x.shape[0]:
                raise ShapeError(f"context: expected ({x.shape[0]}, M, C), got {tuple(context.shape)}")
        if valid is not None:
            expected = tuple((x if context is None else context).shape[:2])
            if valid.dtype != torch.bool or tuple(valid.shape) != expected:
                raise ShapeError(f"valid: expected bool {expected}, got {valid.dtype} {tuple(valid.shape)}")


def legitimate(mechanism: type[Mechanism] | Mechanism, causal: bool) -> bool:
    """``causal``, checked against the patterns of a mechanism; for use in constructors.

    Raises:
        Unsupported: this use is not legitimate.
    """
    name = mechanism.__name__ if isinstance(mechanism, type) else type(mechanism).__name__
    wanted = {"causal-self", "causal-cross"} if causal else {"self", "cross"}
    if not mechanism.patterns & wanted:
        uses = ", ".join(sorted(mechanism.patterns))
        raise Unsupported(f"{name} has no {'causal' if causal else 'noncausal'} form; it supports: {uses}")
    return causal


def visible(
    n: int, causal: bool, valid: Tensor | None = None, past: int = 0, window_size: int | None = None
) -> Mask | None:
    """The mask of n queries after ``past`` tokens: causal or not, without keys that are padding; None if all is seen.

    ``valid``: (B, past + n) bool. ``window_size``: see only keys nearer than that.
    """
    mask = None
    if causal and not (n == 1 and valid is None):
        mask = masks.causal().shift(past)
    if valid is not None and not bool(valid.all()):
        unpadded = masks.padding(valid)
        mask = unpadded if mask is None else mask & unpadded
    if window_size is not None:
        window = masks.sliding_window(window_size).shift(past)
        mask = window if mask is None else mask & window
    return mask


class KV(NamedTuple):
    """A growing streaming state: the keys and values so far.

    Attributes:
        key: (B, Hk, M, D), value: (B, Hk, M, Dv).
        valid: (B, M) bool, or None if nothing was padding.
    """

    key: Tensor
    value: Tensor
    valid: Tensor | None = None

    @classmethod
    def append(cls, state: "KV | None", key: Tensor, value: Tensor, valid: Tensor | None = None) -> "KV":
        """The state with the keys and values (B, Hk, n, ...) of new tokens."""
        if state is None:
            return cls(key, value, valid)
        if valid is not None or state.valid is not None:
            old = state.key.new_ones(state.key.shape[0], state.key.shape[2], dtype=torch.bool)
            new = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
            valid = torch.cat([old if state.valid is None else state.valid, new if valid is None else valid], 1)
        return cls(torch.cat([state.key, key], 2), torch.cat([state.value, value], 2), valid)


def seen(state: KV | None) -> int:
    """How many tokens a state holds."""
    return 0 if state is None else state.key.shape[2]


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a streaming state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


def select_batch(state: Any, index: Tensor) -> Any:
    """The state of the batch items ``index`` (K,): reorders or repeats beams."""
    return pytree.tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, state)


def check_rate(name: str, value: float) -> float:
    """A probability or share in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{name}: expected a number from 0 to 1, got {value}")
    return value
