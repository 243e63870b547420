"""Titans' memory against its recurrence, one chunk after another, with autograd taking the inner gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.memory.titans import NeuralMemory, scan, soft_clamp
from regard.models.language.titans import MemoryAsContextTransformer


def drawn(**config) -> NeuralMemory:
    torch.manual_seed(0)
    memory = NeuralMemory(**config).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return memory


def naive(m: NeuralMemory, x: Tensor) -> Tensor:
    """One head, token by token."""

    def network(weights: dict[str, Tensor], t: Tensor) -> Tensor:
        y = t
        for i in range(sum(name.startswith("w") for name in weights)):
            y = (F.gelu(y) if i else y) @ weights[f"w{i}"]
        if "norm" in weights:
            mean, variance = y.mean(), y.var(unbiased=False)
            y = t + (y - mean) / (variance + 1e-5).sqrt() * (1 + weights["norm"])
        return y

    rows = []
    for sequence in x:
        w = {name: p[0].detach() for name, p in m.memory.items()}
        at, s = w, {name: torch.zeros_like(p) for name, p in w.items()}
        for t in range(len(sequence)):
            if (t + 1) % m.chunk_size == 0:
                chunk = m.store_norm(sequence[t + 1 - m.chunk_size : t + 1])
                leaves = {name: p.clone().requires_grad_() for name, p in at.items()}
                total = 0.0
                for token in chunk:
                    error = network(leaves, m.k_proj(token)) - m.v_proj(token)
                    total = total + m.max_lr * m.theta(token).sigmoid().squeeze() * (error**2).sum() / m.dim
                gradient = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
                mean = chunk.mean(0)
                eta = m.eta(mean).sigmoid() if m.eta is not None else 0.0
                alpha = m.alpha(mean).sigmoid() if m.alpha is not None else 0.0
                s = {name: eta * s[name] - gradient[name] for name in s}
                w = {name: (1 - alpha) * w[name] + s[name] for name in w}
                if m.batch_size is not None and (t + 1) % m.batch_size == 0:
                    at = w
            rows.append(network(w, m.q_proj(m.retrieve_norm(sequence[t]))))
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize(
    "config",
    [
        {"depth": 1, "residual_norm": False},
        {"depth": 2, "chunk_size": 3},
        {"depth": 2, "chunk_size": 2, "batch_size": 4, "max_lr": 0.5},
        {"depth": 3, "batch_size": 1, "max_lr": 0.1},
        {"depth": 1, "chunk_size": 2, "momentum": False, "decay": False, "pre_norm": False},
    ],
    ids=str,
)
def test_equals_the_recurrence(config: dict) -> None:
    memory = drawn(dim=6, **config)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(memory(x), naive(memory, x), atol=1e-10, rtol=1e-8)


def test_the_inner_gradient_of_a_linear_memory_is_what_the_formula_says() -> None:
    memory = drawn(dim=5, depth=1, residual_norm=False, momentum=False, decay=False, pre_norm=False)
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    k, v, w = memory.k_proj(x[0]), memory.v_proj(x[0]), memory.memory["w0"][0]
    want = w - memory.theta(x[0]).sigmoid() * 2 / 5 * k.T @ (k @ w - v)
    torch.testing.assert_close(memory.stream(x)[1].weights["w0"][0, 0], want)


def test_less_than_a_chunk_reads_the_memory_as_it_was_learned() -> None:
    memory = drawn(dim=6, chunk_size=8)
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    untouched = drawn(dim=6, chunk_size=8, max_lr=0.0, decay=False)
    untouched.load_state_dict({k: v for k, v in memory.state_dict().items() if not k.startswith("alpha")})
    torch.testing.assert_close(memory(x), untouched(x))
    assert memory.stream(x[:, :0])[0].shape == (1, 0, 6)


def test_the_outer_gradient_goes_through_the_inner_one() -> None:
    memory = drawn(dim=4, num_heads=2, head_dim=2, chunk_size=2, batch_size=4, qk_norm=True, lr_modulation=True)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory, (x,))
    weight = memory.k_proj.weight  # keys act only through what they write
    assert torch.autograd.grad(memory(x).sum(), weight)[0].abs().max() > 1e-4


def test_scan_is_the_recurrence_at_every_length() -> None:
    for n in (1, 2, 3, 5, 8, 13):
        a, x, y = torch.rand(2, 3, n), torch.randn(2, 3, n, 4), torch.randn(2, 3, 4)
        got = scan(a, x, y)
        for j in range(n):
            y = a[:, :, j, None] * y + x[:, :, j]
            torch.testing.assert_close(got[:, :, j], y)


def test_soft_clamp_bounds_the_norm() -> None:
    clamped = soft_clamp(torch.randn(1, 1, 4, 3, 3) * 100, 2.0)
    torch.testing.assert_close(clamped.flatten(3).norm(dim=-1), torch.full((1, 1, 4), 2.0))


def test_it_recalls_the_pairs_it_was_given() -> None:
    """A linear memory written once with the delta rule on orthogonal keys gives every value back."""
    memory = NeuralMemory(16, depth=1, residual_norm=False, momentum=False, decay=False, pre_norm=False, max_lr=8.0)
    keys, values = torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(16, 16)
    with torch.no_grad():
        memory.memory["w0"].zero_()
        memory.theta.weight.zero_()
        memory.theta.bias.fill_(50.0)  # theta = 8 = D / 2, which makes one step exact
        memory.q_proj.weight.copy_(torch.eye(16))
        memory.k_proj.weight.copy_(torch.eye(16))
        memory.v_proj.weight.copy_(values.T @ keys)
    _, state = memory.stream(keys[None])
    got = memory.read(keys[None], {name: w.unsqueeze(2).repeat(1, 1, 17, 1, 1) for name, w in state.weights.items()})
    torch.testing.assert_close(got[0], values, atol=1e-4, rtol=1e-4)


def recall(depth: int, expansion: float, width: int, learning_rate: float, seed: int = 0) -> float:
    """Mean cosine of 64 random values with what is read back for their keys (of this width) after one pass."""
    torch.manual_seed(seed)
    memory = NeuralMemory(
        width + 16, depth=depth, expansion=expansion, batch_size=1, momentum=False, decay=False, pre_norm=False,
        residual_norm=False, max_lr=2 * learning_rate,
    )  # fmt: skip
    keys, values = (4 * F.normalize(torch.randn(64, n), dim=-1) for n in (width, 16))
    is_key = torch.arange(width + 16) < width
    with torch.no_grad():
        memory.theta.weight.zero_()
        memory.theta.bias.zero_()  # theta is half of max_lr
        for projection, part in ((memory.q_proj, is_key), (memory.k_proj, is_key), (memory.v_proj, ~is_key)):
            projection.weight.copy_(part.diag())
        if depth == 1:
            memory.memory["w0"].zero_()
        state = memory.stream(torch.cat([keys, values], 1)[None])[1]
        asked = torch.cat([keys, torch.zeros_like(values)], 1)[None]
        got = memory.read(asked, {name: w.unsqueeze(2) for name, w in state.weights.items()})[0, :, width:]
    return F.cosine_similarity(got, values, dim=-1).mean().item()


def test_a_network_recalls_random_pairs_after_one_pass() -> None:
    assert recall(2, 2.0, 448, 10.0) > 0.9


def test_a_network_recalls_more_than_a_matrix_when_pairs_exceed_the_width() -> None:
    for seed in range(3):
        matrix = max(recall(1, 1.0, 16, rate, seed) for rate in (0.03, 0.1, 0.3, 1.0))
        assert recall(2, 8.0, 16, 0.3, seed) > matrix + 0.01


def test_refusals() -> None:
    for config, word in (
        ({"num_heads": 1, "head_dim": 3}, "head_dim"),
        ({"chunk_size": 4, "batch_size": 6}, "batch_size"),
        ({"depth": 0}, "depth"),
        ({"chunk_size": 0}, "chunk_size"),
    ):
        with pytest.raises(ArgumentError, match=word):
            NeuralMemory(6, **config)
    with pytest.raises(Unsupported, match="noncausal"):
        NeuralMemory(6, causal=False)
    memory, x = NeuralMemory(6), torch.randn(1, 3, 6)
    with pytest.raises(Unsupported, match="padding must follow"):
        memory(x, valid=torch.tensor([[False, True, True]]))
    with pytest.raises(Unsupported, match="stream takes no padding"):
        memory.stream(x, valid=torch.tensor([[True, True, False]]))
    with pytest.raises(Unsupported, match="momentum_order"):
        NeuralMemory.from_official(memory.state_dict() | {"to_queries.weight": torch.zeros(6, 6)}, momentum_order=2)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_the_language_model_sees_no_future(sliding: bool, gate: bool) -> None:
    torch.manual_seed(0)
    model = MemoryAsContextTransformer(
        11, 8, 2, 3, num_heads=2, head_dim=4, num_persistent=2, num_longterm=1, sliding=sliding, gate_attention=gate,
        memory={"depth": 1},
    )  # fmt: skip
    tokens = torch.randint(11, (2, 13))
    before = model(tokens)
    assert before.shape == (2, 13, 11)
    for t in (1, 6, 12):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])
    torch.testing.assert_close(model(tokens[:, :7]), before[:, :7])


def test_the_language_model_refuses() -> None:
    with pytest.raises(ShapeError, match="tokens"):
        MemoryAsContextTransformer(11, 8, 1, 3)(torch.zeros(3, dtype=torch.long))
    with pytest.raises(Unsupported, match="num_residual_streams"):
        MemoryAsContextTransformer.from_official({}, num_tokens=3, dim=8, depth=1, segment_len=2)
