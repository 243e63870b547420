"""A model of two layers of attention and nothing else that copies: induction by weights that are set by hand.

Phi-3's rotation leaves part of each head alone, so that heads of position and heads of content fit into one model. The
residual stream holds [this token | the token before | what to say | 1]. Head (0, 0) attends to the position before and
writes its token down; `COPY` looks for its own token among the tokens before, and says what it finds there. The other
heads look about at random and write nothing.
"""

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from regard.tasks import Needle, NeedleRun, needle_in_haystack

VOCAB, ROTARY, HEADS, KV_HEADS = 48, 16, 4, 2
COPY = (1, 2)
NEWLINE, STOP = 0, 1  # "\n" ends a needle, "." a sentence
_DIM = ROTARY + VOCAB


class Tokenizer:
    """Token i is the word ``wi``."""

    eos_token_id = VOCAB

    def decode(self, ids, skip_special_tokens=False):
        return " ".join({NEWLINE: "\n", STOP: "."}.get(i, f"w{i}") for i in ids)


@torch.no_grad()
def copy_model():
    hidden = 3 * VOCAB + HEADS  # the last ones are constants; heads must divide it
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=4, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, head_dim=_DIM, pad_token_id=0, eos_token_id=0, bos_token_id=0,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": ROTARY / _DIM},
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    this, before, say = (slice(i * VOCAB, (i + 1) * VOCAB) for i in range(3))
    one, eye = 3 * VOCAB, torch.eye(VOCAB)
    embedding = model.model.embed_tokens.weight.zero_()
    embedding[:, this], embedding[:, one] = eye, 1
    model.lm_head.weight.zero_()[:, say] = eye
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.qkv_proj.weight.normal_(generator=generator)

    def part(layer, kind, head):
        """Rows (head_dim, hidden) of one head's query, key or value."""
        first = {"q": 0, "k": HEADS, "v": HEADS + KV_HEADS}[kind] + (head if kind == "q" else head * KV_HEADS // HEADS)
        return model.model.layers[layer].self_attn.qkv_proj.weight[first * _DIM : (first + 1) * _DIM].zero_()

    def output(layer, head):
        return model.model.layers[layer].self_attn.o_proj.weight[:, head * _DIM + ROTARY : (head + 1) * _DIM]

    angle = 10000.0 ** -(torch.arange(0, ROTARY, 2) / ROTARY)
    part(0, "q", 0)[:ROTARY, one] = 10 * torch.cat([angle.cos(), -angle.sin()])  # turned back by one position
    part(0, "k", 0)[: ROTARY // 2, one] = 1
    part(0, "v", 0)[ROTARY:, this] = eye
    output(0, 0)[before] = eye
    part(*COPY[:1], "q", COPY[1])[ROTARY:, this] = 10 * eye
    part(*COPY[:1], "k", COPY[1])[ROTARY:, before] = eye
    part(*COPY[:1], "v", COPY[1])[ROTARY:, this] = eye
    output(*COPY)[say] = eye
    return model


def runs(count=8, length=60):
    """Random strings that hold ``key value ... value newline`` once, and end with the key."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        key, *values = (torch.randperm(16, generator=generator)[:9] + 2).tolist()
        hay = torch.randint(18, VOCAB, (length,), generator=generator)
        hay[:: 5 + i % 3] = STOP
        depth = i / count
        tokens, place = needle_in_haystack(hay.tolist(), [key, *values, NEWLINE], depth, length, {STOP}, buffer=2)
        answer = " ".join(f"w{v}" for v in values)
        span = (place + 2, place + 2 + len(values))
        made.append(NeedleRun(Needle(f"w{key} {answer}", "which?", answer), (NEWLINE, *tokens, key), span, depth))
    return made
