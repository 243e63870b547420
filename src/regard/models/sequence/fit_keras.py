"""Weights and arguments of FIT's published Keras layers under our names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

ARGUMENTS = {
    "x_size": "num_tokens",
    "x_dim": "dim",
    "x_num_heads": "num_heads",
    "x_pos_encoding": "positions",
    "latent_pos_encoding": "latent_positions",
    "x_self_attention": "local_attention",
    "xattn_with_mlp": "cross_mlp",
    "xattn_enc_ln": "context_norm",
    "drop_units": "dropout",
    "drop_att": "attention_dropout",
}
STAGE = {
    "x_network": "local",
    "l_network": "mix",
    "l2x_cross_attn": "read",
    "l2c_cross_attn": "condition",
    "x2l_cross_attn": "write",
}
TOP = {
    "stem": "stem",
    "stem_ln": "stem_norm",
    "stem_y": "stem_y",
    "stem_y_ln": "stem_y_norm",
    "x_output_ln": "norm",
    "l_output_ln": "latent_norm",
    "x_output_linear": "head",
    "cond_proj": "cond_proj",
    "latent_prev_proj": "previous",
    "latent_prev_ln": "previous_norm",
    "time_emb": "time",
    "latent_pos_emb": "latents",
    "x_pos_emb": "positions",
    "token_embedding": "embedding",
    "inp_token_embedding": "embedding",
    "outp_token_embedding": "out_embedding",
    "outp_bias": "out_bias",
}
INNER = {
    "mha": "attn",
    "self_mha": "attn",
    "cross_mha": "attn",
    "ffn": None,
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "attention_output": "o_proj",
    "ln": "norm",
    "enc_ln": "context_norm",
    "dense0": "fc0",
    "dense1": "fc1",
    "dense2": "fc2",
    "gamma": "weight",
    "beta": "bias",
    "vis_pos_embedding": "table",
}


def own_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments by our names."""
    return {ARGUMENTS.get(name, name): value for name, value in official.items()}


def own_weights(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keras variables, by paths below the model's name, as our state dict."""
    return {own_name(name): _own_layout(name, tensor) for name, tensor in official.items()}


def own_name(name: str) -> str:
    """ "x_network_1/transformer_encoder/mha/ln/gamma" to "trunk.stages.1.local.0.norm.weight"."""
    first, *rest = name.split("/")
    base, number = _numbered(first)
    parts = ["trunk", "stages", str(number), STAGE[base]] if base in STAGE else [TOP.get(first, first)]
    if rest and rest[-1] == "vis_pos_embedding":
        rest = rest[-1:]
    for part, after in zip(rest, [*rest[1:], ""], strict=False):
        kind, number = _numbered(part)
        if kind in ("transformer_encoder", "transformer_decoder_layer"):
            parts.append(str(number))
        elif part == "kernel":
            parts.append("weight")
        elif part.endswith("mha") and after in ("ln", "enc_ln"):
            continue  # the norms before attention stand beside it
        elif (own := INNER.get(part, part)) is not None:
            parts.append(own)
    return ".".join(parts)


def _numbered(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*?)(?:_(\d+))?", name)
    assert found is not None
    return found[1], int(found[2] or 0)


def _own_layout(name: str, tensor: Tensor) -> Tensor:
    """Keras keeps kernels as (in, out), of attention as (in, H, D) and back (H, D, out)."""
    layer, _, kind = name.rpartition("/")
    if kind == "kernel":
        return (tensor.flatten(0, 1) if layer.endswith("attention_output") else tensor.flatten(1)).mT
    return tensor.flatten() if kind == "bias" else tensor
