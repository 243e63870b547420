"""DHSA: predictors, boundaries and labels, sparse prefill with its index lists, block masks, loss."""

from collections.abc import Iterable

import torch

from regard.methods.language.dhsa import (
    BoundarySimilarityAttn,
    BoundarySimilarityStack,
    DHSAConfig,
    a_shape_blocks,
    dhsa_attention,
    focal_bce,
    label_boundaries,
    predict_boundaries,
    soft_label,
    topk_blocks,
    vertical_slash_blocks,
    vertical_slash_blocks_coarse,
)
from regard.methods.language.dhsa.boundaries import key_features
from tests.parity.harness import Comparison, Golden

ATOL = 1e-5


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, x = golden.kwargs, golden.inputs
    query, key, value = x["query"], x["key_raw"], x["value_raw"]

    predictor = BoundarySimilarityAttn(**kwargs["predictor"]).eval()
    predictor.load_state_dict(golden.state("predictor."))
    stack = BoundarySimilarityStack(**kwargs["stack"]).eval()
    stack.load_state_dict(golden.state("stack."))
    with torch.no_grad():
        yield golden.compare("predictor_logits", predictor(key_features(key)), ATOL)
        yield golden.compare("stack_logits", stack(key_features(key)), ATOL)

    predict = dict(kwargs["predict"])
    window_size = predict.pop("boundary_window_size")
    boundaries, _ = predict_boundaries(predictor, key[:1], **predict)
    yield golden.compare("boundaries", torch.tensor(boundaries), 0)
    predict["theta"] = kwargs["label_theta"]
    labelled, ratios = label_boundaries(query[:1], key[:1], window_size=window_size, **predict)
    yield golden.compare("mass_ratio", ratios[0].float(), ATOL)
    yield golden.compare("label_boundaries", torch.tensor(labelled[0]), 0)

    sdpa = kwargs["sdpa"]
    for scope, window in (("global", None), ("sliding", sdpa["sliding_window_size"])):
        for pooling in ("avgpool", "avgpool_norm"):
            config = DHSAConfig(
                block_size=sdpa["block_size"],
                budget=sdpa["topk_tokens"],
                pooling=pooling,
                global_tokens=sdpa["global_tokens"],
                local_tokens=sdpa["local_tokens"],
                instruction_tokens=sdpa["instruction_tokens"] or 0,
            )
            out, indices = dhsa_attention(
                query[:1], key[:1], value[:1], boundaries, config, window=window, scale=sdpa["scaling"]
            )
            yield golden.compare(f"attn/{scope}/{pooling}", out, ATOL)
            yield golden.compare(f"indices/{scope}/{pooling}", indices, 0)

    block = kwargs["block"]
    sizes = (block["topk_blocks"], block["q_block_size"], block["k_block_size"])
    queries, keys, ratio = x["block_query"], x["block_key"], block["vertical_slash_ratio"]
    yield golden.compare("block/mask_topk", topk_blocks(queries, keys, *sizes), 0)
    yield golden.compare("block/mask_A", a_shape_blocks(queries, keys, *sizes), 0)
    yield golden.compare("block/mask_vs", vertical_slash_blocks(queries, keys, *sizes, ratio), 0)
    yield golden.compare("block/mask_vsb", vertical_slash_blocks_coarse(queries, keys, *sizes, ratio), 0)

    target = soft_label(x["ratios"])
    yield golden.compare("soft_label", target, ATOL)
    yield golden.compare("focal_bce", focal_bce(x["logits"], target, x["mask"]).reshape(1), ATOL)
