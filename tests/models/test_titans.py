"""The paper's Titans as language models: no future, streaming, generation; and their layers against loops."""

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import ArgumentError, Unsupported
from regard.mechanisms.memory.titans_layers import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from regard.models.language import LanguageModel
from regard.positions import rotary_angles, rotate

SMALL = {"vocab_size": 17, "dim": 12, "depth": 2, "hidden_dim": 16, "memory": {"chunk_size": 2, "max_lr": 0.1}}
REACH = {"mac": {"segment_len": 4}, "mag": {"window_size": 4}, "mal": {"window_size": 4}, "lmm": {}}


def model(part: str) -> LanguageModel:
    torch.manual_seed(0)
    built = regard.create(f"titans/{part}", **SMALL, **REACH[part], num_heads=2)
    assert isinstance(built, LanguageModel)
    return built.double().eval()


def ids(length: int) -> Tensor:
    return torch.randint(0, 17, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("part", REACH)
@torch.no_grad()
def test_no_token_sees_a_later_one_but_all_see_beyond_their_segment(part: str) -> None:
    built, tokens = model(part), ids(15)
    before = built(tokens)
    for t in range(15):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 17
        after = built(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=0)
        assert not torch.allclose(after[:, t], before[:, t])
        if t < 4:  # more than two layers of attention reach: only the memory carries it
            assert (after[:, -1] - before[:, -1]).abs().max() > 1e-9


@pytest.mark.parametrize("part", REACH)
@torch.no_grad()
def test_streaming_and_generation_are_repeated_forwards(part: str) -> None:
    built, tokens = model(part), ids(13)
    state, got = None, []
    for piece in tokens.split([5, 1, 7], 1):
        logits, state = built.stream(piece, state)
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, 1), built(tokens), atol=1e-10, rtol=0)
    want = tokens
    for _ in range(6):
        want = torch.cat([want, built(want)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(built.generate(tokens, 6), want)


def drawn(cls, **config):
    torch.manual_seed(0)
    layer = cls(8, 2, num_persistent=2, rope_theta=50.0, memory={"chunk_size": 2, "max_lr": 0.3}, **config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return layer


def attend(layer, rows: Tensor, query: int, keys: list[int]) -> Tensor:
    """Token ``query`` of rows (M, C) attends to those of ``keys``, each turned by its place in rows."""
    heads, attn = [], layer.attn
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = (rows @ proj.weight[part].T for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        cos, sin = rotary_angles(torch.arange(len(rows)), 4, 50.0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        heads.append((k[keys] @ q[query] / 2).softmax(0) @ v[keys])
    return attn.o_proj(torch.cat(heads))


def gated(layer, y: Tensor, read: Tensor) -> Tensor:
    normed = read / (read.square().mean(-1, keepdim=True) + torch.finfo(read.dtype).eps).sqrt()
    return y * torch.sigmoid(normed * layer.norm.weight)


@torch.no_grad()
def test_memory_as_context_is_its_equations() -> None:
    layer, x = drawn(MemoryAsContext, segment_len=3), torch.randn(1, 8, 8, dtype=torch.float64)
    state, rows = layer.memory.initial_state(x), []
    for segment in x[0].split(3):
        before = {name: w.unsqueeze(2) for name, w in state.weights.items()}
        h = layer.memory.read(segment[None], before)[0]
        missing = 3 - len(segment)  # the last segment stands where a whole one would
        places = torch.cat([layer.persistent, h, torch.zeros(missing, 8), segment])
        for t in range(len(segment)):
            y = attend(layer, places, 5 + t, [0, 1, *range(2, 3 + t), *range(5, 6 + t)])
            read, state = layer.memory.stream(y[None, None], state)
            rows.append(gated(layer, y, read[0, 0]))
    torch.testing.assert_close(layer(x)[0], torch.stack(rows), atol=1e-6, rtol=1e-6)  # angles are float32


@pytest.mark.parametrize("window", [1, 3, 20])
@torch.no_grad()
def test_memory_as_gate_and_as_layer_are_their_equations(window: int) -> None:
    x = torch.randn(1, 8, 8, dtype=torch.float64)

    def window_attention(layer, rows: Tensor) -> Tensor:
        seen = [[j for j in range(i + 1) if j < 2 or i - j < window] for i in range(10)]
        return torch.stack([attend(layer, rows, i, keys) for i, keys in enumerate(seen)])

    layer = drawn(MemoryAsGate, window_size=window)
    rows = torch.cat([layer.persistent, x[0]])
    want = gated(layer, window_attention(layer, rows), layer.memory(rows[None])[0])
    torch.testing.assert_close(layer(x)[0], want[2:], atol=1e-6, rtol=1e-6)

    layer = drawn(MemoryAsLayer, window_size=window)
    rows = torch.cat([layer.persistent, x[0]])
    want = window_attention(layer, layer.memory(rows[None])[0])
    torch.testing.assert_close(layer(x)[0], want[2:], atol=1e-6, rtol=1e-6)


def test_refusals() -> None:
    for cls, config, word in (
        (MemoryAsContext, {"segment_len": 0}, "segment_len"),
        (MemoryAsGate, {"window_size": 0}, "window_size"),
        (MemoryAsLayer, {"num_persistent": -1}, "num_persistent"),
    ):
        with pytest.raises(ArgumentError, match=f"{word}: expected at least"):
            cls(8, 2, **config)
    layer, x = MemoryAsGate(8, 2), torch.randn(1, 3, 8)
    with pytest.raises(Unsupported, match="padding must follow"):
        layer(x, valid=torch.tensor([[False, True, True]]))
    with pytest.raises(Unsupported, match="stream takes no padding"):
        layer.stream(x, valid=torch.tensor([[True, True, False]]))
