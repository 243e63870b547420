"""Tiny, randomly initialised language models of the families regard is proven on."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "mistral-sliding": {"num_key_value_heads": 2, "sliding_window": 12},
    "gemma3": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "phi3": {"num_key_value_heads": 2, "sliding_window": None},
}

#: every family that has full-attention layers
NAMES = [name for name in _FAMILIES if name != "mistral-sliding"]


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of family `name` in eval mode, the same for the same seed.

    `changes` go to its config. `mistral-sliding` is Mistral with a sliding window in every layer.
    """
    model_type = {"gemma3": "gemma3_text", "mistral-sliding": "mistral"}.get(name, name)
    config = CONFIG_MAPPING[model_type](**{**_COMMON, **_FAMILIES[name], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the default initialisation is so small that attention hardly matters
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    return model
