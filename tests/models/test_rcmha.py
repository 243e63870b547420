"""RCMHA's language model: its memory of earlier segments, no future, published names."""

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import ArgumentError, ShapeError
from regard.models.language.rcmha import RCMHALanguageModel


def model(**config) -> RCMHALanguageModel:
    torch.manual_seed(0)
    small = {"vocab_size": 11, "dim": 8, "depth": 2, "num_heads": 2, "hidden_dim": 12, "mem_len": 5, "max_length": 30}
    built = regard.create("rcmha/model", **{**small, **config}).double()
    with torch.no_grad():
        for parameter in built.parameters():  # the tables begin as zeros
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return built.eval()


def ids(length: int) -> Tensor:
    return torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(length))


def in_segments(built: RCMHALanguageModel, tokens: Tensor, sizes: list[int]) -> Tensor:
    memory, got = None, []
    for segment in tokens.split(sizes, 1):
        logits, memory = built(segment, memory)
        assert all(m.shape[1] <= built.mem_len and not m.requires_grad for m in memory)
        got.append(logits)
    return torch.cat(got, 1)


def test_segments_with_a_long_memory_are_the_whole_text_but_for_convolutions_of_queries() -> None:
    built, tokens = model(kernel_size=1, mem_len=20), ids(12)
    torch.testing.assert_close(in_segments(built, tokens, [5, 1, 6]), built(tokens)[0])
    built = model(depth=1, mem_len=20)
    got, want = in_segments(built, tokens, [6, 6]), built(tokens)[0]
    same = [i for i in range(12) if i not in (6, 7)]  # two queries see zeros instead of the tokens before the segment
    torch.testing.assert_close(got[:, same], want[:, same])
    assert not torch.allclose(got[:, 6:8], want[:, 6:8])


def test_no_token_sees_a_later_one_and_the_memory_reaches_one_segment_per_layer() -> None:
    built, tokens = model(), ids(24)
    sizes = [6] * 4
    before = in_segments(built, tokens, sizes)
    for t in (0, 4, 11, 17, 23):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 11
        after = in_segments(built, changed, sizes)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=0, rtol=0)
        assert not torch.allclose(after[:, t], before[:, t])
        moved = (after - before).unflatten(1, (4, 6)).abs().amax((0, 2, 3)) > 0  # by segment
        # its own, and one more per layer; of six tokens the first is in no memory of the first layer
        reached = range(t // 6, min(4, t // 6 + (3 if t % 6 else 2)))
        assert moved.nonzero().flatten().tolist() == list(reached)
    forgetful = model(mem_len=0)
    segments = [forgetful(segment)[0] for segment in tokens.split(6, 1)]
    torch.testing.assert_close(in_segments(forgetful, tokens, sizes), torch.cat(segments, 1))


def test_the_memory_is_the_inputs_of_the_layers() -> None:
    built, tokens = model(), ids(9)
    _, memory = built(tokens)
    x = built.embedding(tokens)
    torch.testing.assert_close(memory[0], x[:, 4:])
    torch.testing.assert_close(memory[1], built.blocks[0](x, x[:, :0])[:, 4:])
    _, later = built(tokens[:, :2], memory)  # a short segment leaves some of the memory
    torch.testing.assert_close(later[0], torch.cat([memory[0][:, 2:], built.embedding(tokens[:, :2])], 1))


def test_published_names() -> None:
    built = model()
    published = {}
    for name, tensor in built.state_dict().items():
        for own, old in (
            ("embedding", "src_embed"), ("blocks", "transformer.layers"), ("mixer", "self_attn"), ("head", "generator"),
            ("norm1", "norm_self_attn"), ("norm2", "norm_ff"), ("mlp.fc", "feed_forward.layer"),
            ("relative_keys", "key_pos_embeddings"), ("relative_bias", "key_pos_bias"), ("o_proj", "output"),
            ("query_bias", "query_pos_bias"), ("q_proj", "query.0.linear"), ("k_proj", "key.0.linear"),
            ("v_proj", "value.0.linear"), ("q_conv", "query.1"), ("k_conv", "key.1"), ("v_conv", "value.1"),
        ):  # fmt: skip
            name = name.replace(own, old)
        published[f"transformer.{name}" if name.startswith("norm.") else name] = tensor
    loaded = regard.from_official("rcmha", published, variant="model", mem_len=5).double()
    assert isinstance(loaded, RCMHALanguageModel)
    loaded.load_state_dict(built.state_dict())
    torch.testing.assert_close(loaded(ids(7))[0], built(ids(7))[0])


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="mem_len: expected 0 or more"):
        model(mem_len=30)
    with pytest.raises(ShapeError, match="ids"):
        model()(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match="more than max_length = 30"):
        model()(ids(31))
