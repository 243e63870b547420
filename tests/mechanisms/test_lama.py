"""LAMA against its equations, and the classifier around it."""

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.pooled.lama import LowRankPooling
from regard.models.language.lama import LAMAClassifier


def pooling(**changes) -> LowRankPooling:
    torch.manual_seed(0)
    return LowRankPooling(6, 4, **changes).double()


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


VALID = torch.tensor([[True] * 5, [True, False, True, True, False]])


def naive(module: LowRankPooling, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    alpha, pooled = torch.zeros(2, 4, 5, dtype=torch.float64), torch.zeros(2, 4, 6, dtype=torch.float64)
    for b in range(2):
        real = [t for t in range(5) if valid[b, t]]
        c = sum(x[b, t] for t in real) / len(real) if module.context is None else module.context
        for t in real:
            scores = torch.stack([(module.p[:, i] @ c) * (module.q[:, i] @ x[b, t]) for i in range(4)])
            scores = torch.tanh(scores) if module.activation else scores
            alpha[b, :, t] = (scores / scores.square().sum().sqrt()).exp()
        alpha[b] /= alpha[b].sum(-1, keepdim=True)
        for i in range(4):
            pooled[b, i] = sum(alpha[b, i, t] * x[b, t] for t in real)
    return pooled, alpha


@pytest.mark.parametrize("changes", [{}, {"context": "learned"}, {"activation": None}])
@pytest.mark.parametrize("valid", [VALID, None])
def test_is_the_equation(changes: dict, valid: Tensor | None) -> None:
    module, x = pooling(**changes), tokens()
    want, alpha = naive(module, x, torch.ones(2, 5, dtype=torch.bool) if valid is None else valid)
    got, attention = module(x, valid, return_attention=True)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(attention, alpha, atol=1e-12, rtol=0)
    projected = pooling(**changes, output_dim=3)
    linear = projected.projection
    torch.testing.assert_close(projected(x, valid), naive_projection(projected, x, valid), atol=1e-12, rtol=0)
    assert linear.weight.shape == (3, 24)


def naive_projection(module: LowRankPooling, x: Tensor, valid: Tensor | None) -> Tensor:
    pooled, _ = naive(module, x, torch.ones(2, 5, dtype=torch.bool) if valid is None else valid)
    return pooled.reshape(2, 24) @ module.projection.weight.T + module.projection.bias


def test_padding_holds_anything_and_may_be_all_there_is() -> None:
    module, x = pooling(), tokens()
    rubbish = x.masked_fill(~VALID.unsqueeze(-1), 1e3)
    assert torch.equal(module(x, VALID), module(rubbish, VALID))
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    pooled, attention = module(x, nothing, return_attention=True)
    assert torch.equal(pooled, torch.zeros(2, 4, 6, dtype=torch.float64))
    assert not attention.any()


def test_heads_are_soft() -> None:
    module = pooling()
    attention = module.attention(100 * tokens())
    assert (attention.amax(-1) / attention.amin(-1)).max() <= torch.e**2


def test_the_norm_keeps_the_order_of_a_tokens_heads() -> None:
    module, x = pooling(), tokens()
    scores = ((x.mean(1) @ module.p).unsqueeze(-1) * (x @ module.q).mT).tanh()
    sums = module.attention(x).reciprocal() * (scores / scores.norm(dim=1, keepdim=True)).exp()
    torch.testing.assert_close(sums, sums[..., :1].expand_as(sums))  # a softmax of scores scaled per token
    zero = torch.zeros(1, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(module.attention(zero), torch.full((1, 4, 3), 1 / 3, dtype=torch.float64))


def test_counts() -> None:
    def count(**changes) -> int:
        return sum(p.numel() for p in LowRankPooling(32, 5, **changes).parameters())

    assert count() == 2 * 32 * 5
    assert count(output_dim=7) == 2 * 32 * 5 + (32 * 5 + 1) * 7
    assert count(context="learned") == 2 * 32 * 5 + 32


def test_gradients() -> None:
    module = pooling(context="learned", output_dim=2)
    x = tokens().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x, VALID), (x, *module.parameters()))


def test_the_attention_of_the_port_alone() -> None:
    module = pooling()
    alone = LowRankPooling.from_official({"_p": module.p, "_q": module.q}, num_heads=4, input_dim=6, variant="LAMA")
    torch.testing.assert_close(alone.double().attention(tokens()), module.attention(tokens()), atol=1e-6, rtol=0)


def test_the_classifier_reads_each_text_as_if_alone() -> None:
    torch.manual_seed(0)
    model = LAMAClassifier(20, 3, embed_dim=8, hidden_dim=6, num_heads=2).eval()
    ids = torch.randint(0, 20, (2, 7))
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 4:] = False
    logits = model(ids, valid)
    torch.testing.assert_close(logits[:1], model(ids[:1]))
    torch.testing.assert_close(logits[1:], model(ids[1:, :4]))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="num_heads"):
        LowRankPooling(6, 0)
    with pytest.raises(ArgumentError, match="context"):
        LowRankPooling(6, 2, context="max")
    with pytest.raises(ArgumentError, match="activation"):
        LowRankPooling(6, 2, activation="relu")
    with pytest.raises(ShapeError, match="x: expected"):
        pooling()(torch.zeros(2, 5, 7))
    with pytest.raises(ShapeError, match="valid: expected bool"):
        pooling()(tokens(), VALID.double())
    with pytest.raises(ArgumentError, match="variant"):
        LowRankPooling.from_official({}, num_heads=1, input_dim=1, variant="BERT")
    with pytest.raises(ArgumentError, match="missing p"):
        LowRankPooling.from_official({}, num_heads=1, input_dim=1)
    model = LAMAClassifier(20, 3, embed_dim=8, hidden_dim=6, num_heads=2)
    with pytest.raises(ShapeError, match="ids"):
        model(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="behind the text"):
        model(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[False, True, True]] * 2))
