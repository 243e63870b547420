"""StreamingLLM: the published position-shifted attention layer, a prompt and then steps, and its cache."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.cache import SinkLayer, evict_for_space
from regard.masks import causal
from regard.methods.language.streaming_llm import StreamingLLM
from regard.positions import rotate
from regard.sites import Call, Rotary, Site, Step
from tests.parity.harness import Comparison, Golden


class Angles(nn.Module):
    """cos and sin of a plain rotary embedding, as transformers' rotary modules return them."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.inv_freq = theta ** (-torch.arange(0, dim, 2) / dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, state, hidden = golden.kwargs, golden.state(), golden.inputs["hidden_states"]
    start, recent = kwargs["start_size"], kwargs["recent_size"]
    heads = {"q": kwargs["num_heads"], "k": kwargs["num_kv_heads"], "v": kwargs["num_kv_heads"]}
    query, key, value = (
        (hidden @ state[f"{name}_proj.weight"].mT).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in heads.items()
    )
    rotary = Rotary(Angles(kwargs["head_dim"], kwargs["rope_theta"]))
    site = Site(0, 0, "attention", nn.Identity(), rotary=rotary)
    method, layer = StreamingLLM(start_size=start, recent_size=recent), SinkLayer(start, recent)

    outputs, lengths = [], []
    prefill, total = kwargs["prefill"], hidden.shape[1]
    for new in [slice(0, prefill), *(slice(t, t + 1) for t in range(prefill, total))]:
        # as a model would: rotated at its place in the text
        positions = torch.arange(total)[None, new]
        cos, sin = (x[:, None] for x in rotary.angles(positions, hidden))
        step = Step(positions, cos, sin)
        layer.begin(step)
        keys, values = layer.update(rotate(key[:, :, new], cos, sin), value[:, :, new])
        call = Call(
            site, rotate(query[:, :, new], cos, sin), keys, values, None, kwargs["head_dim"] ** -0.5, step, layer=layer
        )
        method.qkv(call)
        out = attention(call.query, call.key, call.value, mask=causal().shift(call.past))
        method.after(call)
        outputs.append(out.transpose(1, 2).flatten(2) @ state["o_proj.weight"].mT)
        lengths.append(layer.length)

    yield golden.compare("attn_output", torch.cat(outputs, dim=1), atol=1e-5)
    yield golden.compare("cache_len", torch.tensor(lengths), atol=0)
    yield golden.compare("final_k", layer.keys, atol=1e-5)
    yield golden.compare("final_v", layer.values, atol=1e-5)
    yield golden.compare("evict_for_space_3_kept", evict_for_space(start + recent, 3, start, recent).float(), atol=0)
