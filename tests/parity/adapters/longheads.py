"""LongHeads: the published LlamaAttention, a prompt and then decoding steps, and the chunk features it caches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from regard.methods.language.longheads import LongHeadsConfig, chunk_features, longheads_attention
from regard.sites import Rotary
from tests.parity.harness import Comparison, Golden


class Angles(nn.Module):
    """cos and sin of a rotary embedding with given frequencies, as transformers' rotary modules return them."""

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, state = golden.kwargs, golden.state()
    heads = kwargs["num_attention_heads"]
    config = LongHeadsConfig(kwargs["window_size"], kwargs["atten_length"], kwargs["begin_selective_length"])
    rotary = Rotary(Angles(state["rotary_emb.inv_freq"]))

    prompt, steps = golden.inputs["hidden_states"], golden.inputs["decode_hidden_states"]
    hidden = torch.cat((prompt, steps), dim=1)
    query, key, value = (
        (hidden @ state[f"{name}_proj.weight"].mT).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
    )

    def features(length: int) -> tuple[Tensor, Tensor]:
        whole = slice(length // config.window_size * config.window_size)
        return chunk_features(query[:, :, whole], key[:, :, whole], value[:, :, whole], rotary, config.window_size)

    def output(start: int, stop: int) -> Tensor:
        out = longheads_attention(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], features(stop)[1], rotary, config
        )
        return out.transpose(1, 2).flatten(2) @ state["o_proj.weight"].mT

    t, total = prompt.shape[1], hidden.shape[1]
    yield golden.compare("prefill", output(0, t), atol=1e-5)
    decoded = [output(i, i + 1) for i in range(t, total)]
    yield golden.compare("decode", torch.cat(decoded, dim=1), atol=1e-5)
    # the prompt's last chunk is never cached, whole or not; the first step that chooses chunks adds what is missing
    cached = total // config.window_size if total >= config.begin_selective_length else -(-t // config.window_size) - 1
    chunk_query, chunk_key = features(total)
    yield golden.compare("chunk_query", chunk_query[:, :, :cached], atol=1e-5)
    yield golden.compare("chunk_key", chunk_key[:, :, :cached], atol=1e-5)
