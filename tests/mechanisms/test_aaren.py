"""Aaren against torch's attention on every prefix, and over long streams."""

import torch

from regard.attention import Partial, merge
from regard.mechanisms.linear.aaren import AarenAttention


def module() -> AarenAttention:
    torch.manual_seed(0)
    layer = AarenAttention(12, 3).double()
    with torch.no_grad():
        layer.query.normal_()
    return layer


def test_it_is_attention_of_the_learned_query_on_every_prefix() -> None:
    layer = module()
    official = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(proj, kind) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)]
            getattr(official, f"in_proj_{kind}").copy_(torch.cat(parts))
            getattr(official.out_proj, kind).copy_(getattr(layer.o_proj, kind))
    for scale in (1.0, 200.0):
        x = scale * torch.randn(2, 7, 12, dtype=torch.float64)
        got = layer(x)
        for i in range(7):
            want, _ = official(layer.query.expand(2, 1, 12), x[:, : i + 1], x[:, : i + 1])
            torch.testing.assert_close(got[:, i : i + 1], want)


def test_a_long_stream_is_the_parallel_form() -> None:
    layer = module().float()
    x = torch.randn(1, 2000, 12)
    state, got = None, []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            y, state = layer.stream(token, state)
            got.append(y)
        torch.testing.assert_close(torch.cat(got, 1), layer(x), atol=1e-5, rtol=1e-5)


def test_states_of_stretches_merge_in_any_order() -> None:
    layer = module()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    parts = [layer.stream(piece)[1] for piece in x.split([2, 4, 3], dim=1)]
    partials = [
        Partial((s.weighted / s.total[..., None]).unsqueeze(2), (s.peak + s.total.log()).unsqueeze(2)) for s in parts
    ]
    _, whole = layer.stream(x)
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = merge(*(partials[i] for i in order))
        torch.testing.assert_close(merged.out.squeeze(2), whole.weighted / whole.total[..., None])
        torch.testing.assert_close(merged.lse.squeeze(2), whole.peak + whole.total.log())


def test_gradients() -> None:
    x = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module(), (x,))


def test_one_vector_more_than_multi_head_attention() -> None:
    assert sum(p.numel() for p in AarenAttention(64, 4).parameters()) == 4 * (64 * 64 + 64) + 64
